"""What the compiler makes of the kernels for the GPU: vector loads and stores, no spilled arrays, no slow division."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("nvidia.cu13", reason="NVVM is not installed")

# (dtype, width, planar) -> (vector load, vector store), but for the type, which says nothing
VARIANTS = {
    ("f32", 4, True): ("ld.global.v4", "st.global.cs.v4"),
    ("f32", 4, False): ("ld.global.v4", "st.global.cs.v4"),
    ("f32", 1, True): ("ld.global", "st.global"),
    ("f64", 2, True): ("ld.global.v2", "st.global.cs.v4"),
    ("f16", 4, False): ("ld.global.v2", "st.global.v4"),
    ("bf16", 8, True): ("ld.global.v4", "st.global.cs.v4"),
    ("bf16", 4, False): ("ld.global.v2", "st.global.v2"),
}
DIRECTIONS = ("forward", "backward")
CASES = list(product(DIRECTIONS, VARIANTS))


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}  # a compiler
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("cuda_machine_code.py")],
        input=json.dumps([(direction, *variant, "hardswish") for direction, variant in CASES]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(CASES, json.loads(process.stdout), strict=True))


def instructions(ptx, pattern):
    return re.findall(rf"^\s*(?:@!?%p\d+ )?({pattern})\s", ptx, re.MULTILINE)


@pytest.mark.parametrize(
    ("direction", "variant"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v))
)
def test_cuda_machine_code(compiled, direction, variant):
    found = compiled[direction, variant]
    ptx, loads = found["ptx"], found["loads"]
    load, store = VARIANTS[variant]
    operands = 1 if direction == "forward" else 2  # x; and dy
    assert len(instructions(ptx, rf"{re.escape(load)}\.[a-z]\d+")) >= loads * operands
    assert len(instructions(ptx, rf"{re.escape(store)}\.[a-z]\d+")) >= 1
    assert not instructions(ptx, r"(?:ld|st)\.local\S*"), "an array that should be in registers is in memory"
    assert not instructions(ptx, r"div\.\S*f32|sqrt\.approx\S*|rsqrt\S*|div\.approx\S*|div\.full\S*")
    assert not instructions(ptx, r"atom\S*|red\S*"), "an order of summation would be left to chance"
    assert "ftz" not in ptx, "denormals are numbers"
    shared = [int(n) for n in re.findall(r"\.shared \.align.*\[(\d+)\];", ptx)]
    assert shared and sum(shared) <= 48 * 1024


def test_cuda_divisions_stand_before_the_loops(compiled):
    """The inner loops of forward walk without dividing: a basic block that loads vectors has no division in it."""
    for variant in VARIANTS:
        load, _ = VARIANTS[variant]
        ptx = compiled["forward", variant]["ptx"]
        for block in re.split(r"^\$L\S+:", ptx, flags=re.MULTILINE):
            if instructions(block, rf"{re.escape(load)}\.[a-z]\d+") and variant[1] > 1:
                assert not instructions(block, r"(?:div|rem)\.\S*"), block
