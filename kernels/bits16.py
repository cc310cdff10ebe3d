"""bfloat16 and float16 in compiled code, which numba's CPU target has no types for.

An array of uint16 holds bfloat16, one of int16 holds float16: the two integer types tell `widen`
and `narrow` which is meant, so that one loop serves both. bfloat16 is arithmetic on the bits, which
LLVM vectorises (8192 elements from the cache into float32: 1.4 us, as float32). float16 is one
instruction where the CPU has F16C, else arithmetic on the bits as well (into float16: 1.8 and
3.7 us).

Rejected: LLVM's ``fpext`` from half without F16C, a call of a function that numba does not link: a
segmentation fault. Its ``fptrunc`` to bfloat: AVX512-BF16's instruction takes subnormals for zero.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types

from ucxgossip import jit
from ucxgossip.kernels.cpu import BLOCK, loose_add

_config: Any = numba.config
_FLOAT, _HALF, _I16, _I32 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)
_SIGN, _MAGNITUDE, _INFINITY = 0x80000000, 0x7FFFFFFF, 0x7F800000
_F16_SHIFT = 13  # bits by which float32's fraction is longer
_F16_BIAS = 112  # by which its exponent is larger
_F16_NORMAL = 113 << 23  # 2**-14, float16's least normal number
_F16_OVER = 143 << 23  # 2**16, above all that rounds to a finite float16


def _widen_bfloat16(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _FLOAT)


def _narrow_bfloat16(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, _I32)
    upper = builder.lshr(bits, _I32(16))
    odd = builder.and_(upper, _I32(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))
    quiet = builder.or_(upper, _I32(0x40))  # a NaN whose fraction is in the lower half stays one
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, quiet, rounded), _I16)


def _has_f16c() -> bool:
    """Whether the code that numba makes may hold F16C's instructions."""
    if _config.CPU_NAME is not None or _config.CPU_FEATURES is not None:  # not the host's
        return "+f16c" in (_config.CPU_FEATURES or "")
    return bool(llvm.get_host_cpu_features().get("f16c"))


def _widen_float16(builder: Any, value: Any) -> Any:
    if _F16C:
        return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
    return _widen_float16_bits(builder, value)


def _narrow_float16(builder: Any, value: Any) -> Any:
    if _F16C:
        return builder.bitcast(builder.fptrunc(value, _HALF), _I16)
    return _narrow_float16_bits(builder, value)


def _widen_float16_bits(builder: Any, value: Any) -> Any:
    """Exponent and fraction moved, then the bias put right by a multiplication that is exact."""
    bits = builder.zext(value, _I32)
    magnitude = builder.and_(bits, _I32(0x7FFF))
    moved = builder.bitcast(builder.shl(magnitude, _I32(_F16_SHIFT)), _FLOAT)
    scaled = builder.bitcast(builder.fmul(moved, _FLOAT(2.0**_F16_BIAS)), _I32)
    special = builder.icmp_unsigned(">=", magnitude, _I32(0x7C00))
    scaled = builder.select(special, builder.or_(scaled, _I32(_INFINITY)), scaled)
    sign = builder.shl(builder.and_(bits, _I32(0x8000)), _I32(16))
    return builder.bitcast(builder.or_(scaled, sign), _FLOAT)


def _narrow_float16_bits(builder: Any, value: Any) -> Any:
    """Subnormals are rounded by an addition to 0.5, whose last bit is float16's least number."""
    bits = builder.bitcast(value, _I32)
    magnitude = builder.and_(bits, _I32(_MAGNITUDE))
    shifted = builder.fadd(builder.bitcast(magnitude, _FLOAT), _FLOAT(0.5))
    subnormal = builder.sub(builder.bitcast(shifted, _I32), _I32(126 << 23))
    odd = builder.and_(builder.lshr(magnitude, _I32(_F16_SHIFT)), _I32(1))
    half = _I32((0xFFF - (_F16_BIAS << 23)) & 0xFFFFFFFF)
    normal = builder.lshr(builder.add(magnitude, builder.add(odd, half)), _I32(_F16_SHIFT))
    nan = builder.icmp_unsigned(">", magnitude, _I32(_INFINITY))
    over = builder.select(nan, _I32(0x7E00), _I32(0x7C00))
    small = builder.icmp_unsigned("<", magnitude, _I32(_F16_NORMAL))
    narrow = builder.select(small, subnormal, normal)
    large = builder.icmp_unsigned(">=", magnitude, _I32(_F16_OVER))
    narrow = builder.select(large, over, narrow)
    sign = builder.lshr(builder.and_(bits, _I32(_SIGN)), _I32(16))
    return builder.trunc(builder.or_(narrow, sign), _I16)


_F16C = _has_f16c()


@jit.intrinsic
def _widen(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == types.uint16:
            return _widen_bfloat16(builder, args[0])
        return _widen_float16(builder, args[0]) if value == types.int16 else args[0]

    return types.float32(value), codegen


@jit.intrinsic
def _narrow(typingctx: Any, value: Any, like: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like == types.uint16:
            return _narrow_bfloat16(builder, args[0])
        return _narrow_float16(builder, args[0]) if like == types.int16 else args[0]

    return like(types.float32, like), codegen


def widen(value: Any) -> Any:
    """The float32 that a uint16 (bfloat16) or an int16 (float16) stands for; a float32 itself."""
    if value.dtype == np.uint16:
        return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return value.view(np.float16).astype(np.float32) if value.dtype == np.int16 else value


def narrow(value: Any, like: Any) -> Any:
    """`value`, a float32, in the type that `like` is of, rounded to nearest even."""
    if like.dtype == np.uint16:
        bits = value.view(np.uint32)
        upper = bits >> np.uint32(16)
        if np.isnan(value):
            return (upper | np.uint32(0x40)).astype(np.uint16)
        return np.uint16((int(bits) + 0x7FFF + int(upper & np.uint32(1))) >> 16)
    return value.astype(np.float16).view(np.int16) if like.dtype == np.int16 else value


jit.compiled_as(widen, lambda value: _widen(value))
jit.compiled_as(narrow, lambda value, like: _narrow(value, like))


@jit.njit
def mix_block(dst: Any, src: Any, alpha: Any) -> float:
    """Mix one block; the sum of its squared differences, added up in float32."""
    total = alpha - alpha  # zero of float32
    for i in range(len(dst)):
        before = widen(dst[i])
        difference = widen(src[i]) - before
        dst[i] = narrow(before + alpha * difference, dst[i])
        total = loose_add(total, difference * difference)
    return float(total)


@jit.njit
def copy_block(dst: Any, src: Any) -> None:
    """``dst = src``, widened where `dst` is float32: exact."""
    for i in range(len(dst)):
        dst[i] = narrow(widen(src[i]), dst[i])


@jit.njit
def mix(dst: Any, src: Any, alpha: Any) -> float:
    """``dst += alpha * (src - dst)``; the squared distance of the inputs. No checks.

    dst: float32, uint16 or int16 (bfloat16, float16); src: uint16 or int16; alpha: a float32.
    """
    distance = 0.0
    for start in range(0, len(dst), BLOCK):
        block_dst, block_src = dst[start : start + BLOCK], src[start : start + BLOCK]
        distance += mix_block(block_dst, block_src, alpha)
        if alpha == 1:
            copy_block(block_dst, block_src)
    return distance
