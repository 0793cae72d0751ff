"""Triton's interpreter, mended so that it computes as a GPU does.

It keeps bfloat16 as 16-bit patterns, and multiplies and adds those as integers; it truncates what it casts to bfloat16.
Here arithmetic runs on the numbers that the patterns stand for, in float32, and results are rounded to nearest, ties to
even.

Its float32 products are those of numpy's BLAS, which on some processors adds up the terms of x y^T and y x^T in another
order: the scores that a backward pass computes anew are then not those of the forward pass. Here both are summed in
float64 and rounded once, so that they are the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers of bfloat16 patterns: the patterns are their upper halves."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """The bfloat16 patterns nearest to float32 numbers, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).reshape(np.shape(numbers))
    # half a unit of what is kept, less one if that is even: a tie then only carries into an odd pattern
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def mend_bfloat16() -> None:
    """Replace the interpreter's casts, products and arithmetic by such as know bfloat16. Twice does no more than once."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "knows_bfloat16"):
        return
    InterpreterBuilder.knows_bfloat16 = True

    def is_bfloat16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def float32(handle: Any) -> Any:
        return TensorHandle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle

    def result(handle: Any) -> Any:
        """Arithmetic's float32 result as bfloat16; a comparison's stays what it is."""
        if handle.data.dtype != np.float32:
            return handle
        return TensorHandle(narrow(handle.data), tl.bfloat16)

    def cast(original: Any) -> Any:
        def cast_impl(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
            if not is_bfloat16(src) and dst_type.scalar != tl.bfloat16:
                return original(self, src, dst_type, *rounding)
            src = float32(src)
            if dst_type.scalar == tl.bfloat16:
                return TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)
            if dst_type.scalar == tl.float32:
                return src
            return original(self, src, dst_type, *rounding)

        return cast_impl

    def arithmetic(original: Any) -> Any:
        def operate(self: Any, *handles: Any) -> Any:
            *operands, op = handles
            if op is np.where or not any(map(is_bfloat16, operands)):
                return original(self, *handles)
            return result(original(self, *map(float32, operands), op))

        return operate

    def dot(self: Any, a: Any, b: Any, total: Any, *precision: Any) -> Any:
        x, y = (float32(factor).data.astype(np.float64) for factor in (a, b))
        return TensorHandle((x @ y).astype(total.data.dtype) + total.data, total.dtype.scalar)

    fma = InterpreterBuilder.create_fma
    InterpreterBuilder.cast_impl = cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = cast(InterpreterBuilder.create_fp_to_fp)
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(InterpreterBuilder, name, arithmetic(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_fma = lambda self, x, y, z: (
        result(fma(self, *map(float32, (x, y, z)))) if is_bfloat16(z) else fma(self, x, y, z)
    )
