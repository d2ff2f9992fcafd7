"""What the compiler makes of the kernels for the GPU: vector loads and stores, no spilled arrays, no slow division."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("nvidia.cu13", reason="NVVM is not installed")

# (dtype, width, planar) -> (vector load, vector store), but for the type, which says nothing
VARIANTS = {
    ("f32", 4, True): ("ld.global.v4", "st.global.cs.v4"),
    ("f32", 4, False): ("ld.global.v4", "st.global.cs.v4"),
    ("f32", 1, True): ("ld.global", "st.global"),
    ("f64", 2, False): ("ld.global.v2", "st.global.cs.v4"),
    ("f16", 4, False): ("ld.global.v2", "st.global.v4"),
    ("bf16", 8, True): ("ld.global.v4", "st.global.cs.v4"),
    ("bf16", 4, False): ("ld.global.v2", "st.global.v2"),
}
REDUCE, MAP, BOTH = 1, 2, 3
# Both phases in one kernel: planar only.
CASES = [
    (direction, *variant, phases)
    for direction in ("forward", "backward")
    for variant in VARIANTS
    for phases in ((REDUCE, MAP) if variant != ("f32", 4, True) else (REDUCE, MAP, BOTH))
]


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}  # a compiler
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("cuda_machine_code.py")],
        input=json.dumps([(*case, case[-1] != REDUCE) for case in CASES]),  # a map with a residual and a mask
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(CASES, json.loads(process.stdout), strict=True))


def instructions(ptx, pattern):
    return re.findall(rf"^\s*(?:@!?%p\d+ )?({pattern})\s", ptx, re.MULTILINE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_cuda_machine_code(compiled, case):
    direction, *variant, phases = case
    found = compiled[case]
    ptx, loads = found["ptx"], found["loads"]
    load, store = VARIANTS[tuple(variant)]
    operands = 1 if direction == "forward" else 2  # x; and dy
    assert len(instructions(ptx, rf"{re.escape(load)}\.[a-z]\d+")) >= loads * operands
    assert phases == REDUCE or instructions(ptx, rf"{re.escape(store)}\.[a-z]\d+")
    assert not instructions(ptx, r"(?:ld|st)\.local\S*") and not found["spilled"], "registers have become memory"
    assert found["registers"] * found["threads"] <= 65536, "a block does not find its registers"
    assert not instructions(ptx, r"div\.\S*f32|sqrt\.approx\S*|rsqrt\S*|div\.approx\S*|div\.full\S*")
    assert not instructions(ptx, r"atom\S*|red\S*"), "an order of summation would be left to chance"
    assert "ftz" not in ptx, "denormals are numbers"
    shared = [int(n) for n in re.findall(r"\.shared \.align.*\[(\d+)\];", ptx)]
    assert shared and sum(shared) <= 48 * 1024


def test_cuda_divisions_stand_before_the_loops(compiled):
    """The inner loops of forward walk without dividing: a basic block that loads vectors has no division in it."""
    for case in CASES:
        direction, *variant, _phases = case
        load, _ = VARIANTS[tuple(variant)]
        for block in re.split(r"^\$L\S+:", compiled[case]["ptx"], flags=re.MULTILINE):
            if direction == "forward" and variant[1] > 1 and instructions(block, rf"{re.escape(load)}\.[a-z]\d+"):
                assert not instructions(block, r"(?:div|rem)\.\S*"), block
