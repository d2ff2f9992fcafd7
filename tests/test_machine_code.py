"""What the compiler made of the kernels, read from the compiled module."""

import re
import shutil
import subprocess

import pytest

import fastbn._core
from combinations import ISAS, each_dtype
from problems import dtype_of

LIBRARY = fastbn._core.__file__
CODES = {dtype_of(name): code for code, name in fastbn._core.dtypes()}
# The widest registers of an ISA, as the disassembler writes them; packed arithmetic on float32 or float64.
REGISTERS = {"avx512": "zmm", "avx2": "ymm", "baseline": "xmm", "neon": r"v\d+"}
KERNELS = [
    f"{operation}_{family}"
    for operation in ("stats", "apply", "backward_stats", "backward_apply")
    for family in ("planar", "interleaved")
]


@pytest.fixture(scope="module")
def functions():
    """Disassembly of every function of the library, by symbol."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    return dict(re.findall(r"^[0-9a-f]+ <([^>]+)>:\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("isa", ISAS)
@each_dtype
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compute_in_full_registers(functions, isa, dtype, kernel):
    body = functions[f"{kernel}_{CODES[dtype]}_{isa}"]
    register = REGISTERS[isa]
    # sums are float64 everywhere; y and dx are computed in the dtype
    suffix = "d" if "stats" in kernel or dtype == "float64" else "s"
    for operation in ("sub", "add", "mul") if "backward_apply" not in kernel else ("sub", "mul"):
        pattern = rf"\bv?{operation}p{suffix}\s.*{register}" if isa != "neon" else rf"\bf{operation}\s+{register}"
        assert re.search(pattern, body), f"no packed {operation} on {register}"


def test_no_fused_multiply_add(functions):
    """A fused operation rounds once where others round twice: it would change bits. Nowhere in the library."""
    fused = re.compile(r"\bv?fn?m(add|sub)\w*[ps][sd]|\bfml[as]\b|\bfn?m(add|sub)\b")
    assert len(functions) > 100
    assert not [name for name, body in functions.items() if fused.search(body)]


def test_no_mathematical_library_function():
    """A libm differs from machine to machine. The square root is an instruction."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], check=True, capture_output=True, text=True
    ).stdout.split()
    import math

    functions = {name for name in vars(math) if not name.startswith("_")} | {"fma", "rint", "nearbyint", "pow"}
    assert not functions & {symbol.split("@")[0].rstrip("fl") for symbol in symbols}
    assert not functions & {symbol.split("@")[0] for symbol in symbols}
