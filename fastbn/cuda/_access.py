"""Reading and writing device memory: vectors of a dtype, single floats of any dtype, bytes.

Kernels see memory as addresses (integers, in bytes), never as arrays: an address costs nothing at launch, and a vector
load of 16 bytes is one instruction, which Numba does not make of array accesses. On the GPU each function is some LLVM
IR (`_access_ir`); in Numba's simulator, which has none, its twin does the same with the address of host memory.

float16 and bfloat16 are float32 in registers, rounded to nearest even where they are stored.

``load, store = vector(code, width)``
    ``load(address, values, offset)`` and ``store(address, values, offset)`` of `width` adjacent values; `values` is a
    local array of the arithmetic's type. The address is a multiple of the vector's size.
``peek, poke = scalar(code)``
    ``peek(address)``, a float64, and ``poke(address, value)``, which rounds (to half precision by way of float32).
``peek_byte(address)``, ``poke_byte(address, value)``
    A byte as an integer.
"""

from __future__ import annotations

from numba.core import config

from ._plan import FORMATS

__all__ = ["FORMATS", "SIMULATOR", "peek_byte", "poke_byte", "scalar", "vector"]

SIMULATOR = bool(config.ENABLE_CUDASIM)

if SIMULATOR:
    from ._access_simulated import peek_byte, poke_byte, scalar, vector
else:
    from ._access_ir import peek_byte, poke_byte, scalar, vector
