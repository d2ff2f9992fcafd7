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
    suffix = f"_{CODES[dtype]}_{isa}"
    body = functions[kernel + suffix]
    body += "".join(functions[name] for name in set(re.findall(rf"<(\w+{suffix}(?:\.\w+)*)>", body)))  # called by it
    register = REGISTERS[isa]
    # sums are float64 everywhere; y and dx are computed in the dtype
    suffix = "d" if "stats" in kernel or dtype == "float64" else "s"
    for operation in ("sub", "add", "mul") if "backward_apply" not in kernel else ("sub", "mul"):
        pattern = rf"\bv?{operation}p{suffix}\s.*{register}" if isa != "neon" else rf"\bf{operation}\s+{register}"
        assert re.search(pattern, body), f"no packed {operation} on {register}"
    if dtype != "float64" and isa != "baseline":
        pattern = rf"\bvfmadd\d+p{suffix}\s.*{register}" if isa != "neon" else rf"\bfmla\s+{register}"
        assert re.search(pattern, body), f"no packed multiply-add on {register}"


def test_only_float32_kernels_fuse(functions):
    """A fused operation rounds once where others round twice: bits would depend on who has it. That of float32 is made
    of others where it is missing (multiply_add_f32), and in sums a product may be fused that is exact in float64, be it
    by one (add_as_product_f64). Nothing else is: nothing of float64 values, no scalar."""
    fused = re.compile(r"\bv?fn?m(?:add|sub)\w*[ps][sd]\b|\bfml[as]\b|\bfn?m(?:add|sub)\b")
    assert len(functions) > 100
    found = {name: set(fused.findall(body)) for name, body in functions.items()}
    found = {name: used for name, used in found.items() if used}
    packed = re.compile(r"vfn?m(?:add|sub)\d+p[sd]|fml[as]")
    assert found and all(packed.fullmatch(operation) for used in found.values() for operation in used), found
    kernels = re.compile(r"\w+_(f32|f16|bf16)_(avx2|avx512|neon)(\.\w+)*")
    assert [name for name in found if not kernels.fullmatch(name)] == []


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
