"""`_access` on the GPU: LLVM IR."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from ._plan import FORMATS

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
STORED = {"f32": F32, "f64": ir.DoubleType(), "f16": ir.HalfType(), "bf16": I16}


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer(1))  # address space 1: global memory


def _widened(builder: Any, code: str, value: Any) -> Any:
    if code == "f16":
        return builder.fpext(value, F32)
    if code == "bf16":
        return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)
    return value


def _half_of_word(builder: Any, code: str, word: Any, upper: int) -> Any:
    """One of the two values in 32 bits, as float32."""
    if code == "f16":
        pair = builder.bitcast(word, ir.VectorType(STORED["f16"], 2))
        return builder.fpext(builder.extract_element(pair, I32(upper)), F32)
    # A bfloat16 is the upper half of a float32.
    return builder.bitcast(builder.and_(word, I32(0xFFFF0000)) if upper else builder.shl(word, I32(16)), F32)


def _rounded_pair(builder: Any, code: str, low: Any, high: Any) -> Any:
    """Two float32 as two values in 32 bits; for bfloat16 by the instruction of compute capability 8.0 for it."""
    if code == "f16":
        pair = ir.VectorType(STORED["f16"], 2)(ir.Undefined)
        for place, value in enumerate((low, high)):
            pair = builder.insert_element(pair, builder.fptrunc(value, STORED["f16"]), I32(place))
        return builder.bitcast(pair, I32)
    kind = ir.FunctionType(I32, [F32, F32])
    return builder.asm(kind, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], False)


def _narrowed(builder: Any, code: str, value: Any) -> Any:
    if code == "f16":
        return builder.fptrunc(value, STORED[code])
    if code == "bf16":  # in integers, as on the CPU: every kernel writes running statistics, on every GPU
        bits = builder.bitcast(value, I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, I32(0x7FFF)), odd), I32(16))
        nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(nan, I32(0x7FC0), rounded), I16)
    return value


def _element(context: Any, builder: Any, kind: Any, array: Any, offset: Any, v: int) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [builder.add(offset, offset.type(v))])


@lru_cache
def vector(code: str, width: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``load(address, values, offset)`` and ``store(address, values, offset)`` of `width` adjacent values.

    `values` is a local array of the arithmetic's type. The address is a multiple of the vector's size. A store of
    16 bytes is streaming (evicted first), so that it leaves in the L2 cache what will be read again.
    """
    nbytes = width * FORMATS[code][0]
    if width == 1:
        memory = STORED[code]
    elif FORMATS[code][0] == 2:  # vectors of 16 bits would be loaded piece by piece
        memory = ir.VectorType(I32, width // 2)
    else:
        memory = ir.VectorType(STORED[code], width)

    @intrinsic
    def load(typing: Any, address: Any, values: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, array, offset = args
            loaded = builder.load(_pointer(builder, address, memory), align=nbytes)
            for v in range(width):
                if width == 1:
                    value = _widened(builder, code, loaded)
                elif FORMATS[code][0] == 2:
                    value = _half_of_word(builder, code, builder.extract_element(loaded, I32(v // 2)), v % 2)
                else:
                    value = _widened(builder, code, builder.extract_element(loaded, I32(v)))
                builder.store(value, _element(context, builder, signature.args[1], array, offset, v))
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64), generate

    @intrinsic
    def store(typing: Any, address: Any, values: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, array, offset = args
            values = [
                builder.load(_element(context, builder, signature.args[1], array, offset, v)) for v in range(width)
            ]
            if FORMATS[code][0] == 2 and width > 1:
                parts = [_rounded_pair(builder, code, *values[v : v + 2]) for v in range(0, width, 2)]
            else:
                parts = [_narrowed(builder, code, value) for value in values]
            stored = parts[0]
            if width > 1:
                stored = memory(ir.Undefined)
                for v, part in enumerate(parts):
                    stored = builder.insert_element(stored, part, I32(v))
            if nbytes < 16:
                builder.store(stored, _pointer(builder, address, memory), align=nbytes)
            else:
                words = builder.bitcast(stored, ir.VectorType(I32, 4))
                text = "st.global.cs.v4.b32 [$0], {$1, $2, $3, $4};"
                kind = ir.FunctionType(ir.VoidType(), [I64] + [I32] * 4)
                parts = [builder.extract_element(words, I32(w)) for w in range(4)]
                builder.asm(kind, text, "l,r,r,r,r,~{memory}", [address, *parts], True)
            return context.get_dummy_value()

        return types.void(types.int64, values, types.int64), generate

    return load, store


@lru_cache
def scalar(code: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``peek(address)``, a float64, and ``poke(address, value)``, which rounds once, of a float of any dtype."""
    size, real = FORMATS[code]
    narrow = real is np.float32

    @intrinsic
    def peek(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = _widened(builder, code, builder.load(_pointer(builder, args[0], STORED[code]), align=size))
            return builder.fpext(value, STORED["f64"]) if narrow else value

        return types.float64(types.int64), generate

    @intrinsic
    def poke(typing: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.fptrunc(args[1], F32) if narrow else args[1]
            builder.store(_narrowed(builder, code, value), _pointer(builder, args[0], STORED[code]), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, types.float64), generate

    return peek, poke


@intrinsic
def peek_byte(typing: Any, address: Any) -> Any:
    """The byte at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(_pointer(builder, args[0], I8), align=1), I64)

    return types.int64(types.int64), generate


@intrinsic
def poke_byte(typing: Any, address: Any, value: Any) -> Any:
    """Write a byte."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], I8), _pointer(builder, args[0], I8), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
