"""Which kernels a processor gets: src_c/dispatch.c on processors that are emulated by qemu."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastbn import _core

SOURCES = Path(__file__).resolve().parent.parent / "src_c"
X86_64 = re.findall(r"^FASTBN_ISA\(x86_64, (\w+),", (SOURCES / "isa.def").read_text(), re.MULTILINE)
PROGRAM = """
#include "fastbn.h"
#include <stdio.h>
%s
int main(void)
{
    for (int i = 0; i < fastbn_isa_count(); i++) {
        if (fastbn_isa_available(i)) printf("%%s ", fastbn_get_isa(i)->name);
    }
    printf("%%d", (int)(fastbn_get_sizes(fastbn_sizes_here())->stream >> 20));
}
"""


@pytest.fixture(scope="module")
def dispatch(tmp_path_factory):
    """A program that prints the ISAs of its processor, best first, and the MiB from which a call streams its stores."""
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("qemu-x86_64") or not shutil.which("cc"):
        pytest.skip("needs x86-64, qemu-user and a C compiler")
    folder = tmp_path_factory.mktemp("dispatch")
    tables = "\n".join(f'const fastbn_isa fastbn_isa_{name} = {{.name = "{name}"}};' for name in X86_64)
    (folder / "main.c").write_text(PROGRAM % tables)
    sources = [folder / "main.c", SOURCES / "dispatch.c"]
    subprocess.run(["cc", "-static", f"-I{SOURCES}", *sources, "-o", folder / "dispatch"], check=True)
    return folder / "dispatch"


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("Nehalem", "baseline 84"),
        ("IvyBridge", "baseline 84"),  # F16C, but not AVX2
        ("Haswell", "avx2 baseline 84"),
        ("Haswell,-f16c", "baseline 84"),
        ("Haswell,-avx2", "baseline 84"),
        ("Haswell,-fma", "baseline 84"),
        ("EPYC", "avx2 baseline 26"),
    ],
)
def test_dispatch_gives_a_processor_what_it_knows(dispatch, processor, expected):
    """qemu does not emulate AVX-512."""
    ran = subprocess.run(["qemu-x86_64", "-cpu", processor, dispatch], capture_output=True, text=True, check=True)
    assert ran.stdout == expected


def test_dispatch_streams_from_what_was_measured_on_such_a_processor():
    """This one, which may have what qemu does not emulate."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    vendor = re.search(r"^vendor_id\s*: (\w+)$", text, re.MULTILINE)
    if not vendor:
        pytest.skip("needs the x86-64 form of /proc/cpuinfo")
    mib = 84
    if vendor[1] == "AuthenticAMD":
        mib = 26
    elif vendor[1] == "GenuineIntel" and re.search(r"^flags.* avx512_fp16\b", text, re.MULTILINE):
        mib = 48
    measured = _core.MEASURED_STREAM_BYTES >> 20
    assert measured == mib
