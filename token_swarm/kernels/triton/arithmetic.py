"""Device functions that several kernels share: exponentials that keep their digits."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Triton compiles these functions from their source: their arguments have Triton's types, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
INFINITY = tl.constexpr(float("inf"))
LARGE = tl.constexpr(1e30)


@triton.jit
def two_sum(a, b):
    """a + b as a rounded sum and what rounding left out (Knuth, TAOCP 2, 4.2.2, theorem B)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def split(value):
    """A float64 scalar as two float32 whose sum holds 48 of its bits."""
    high = value.to(tl.float32)
    return high, (value - high.to(tl.float64)).to(tl.float32)


@triton.jit
def relative_exponential(logits, top, scale_high, scale_low):
    """2^((logit - top) * scale), 0 for a logit of -inf.

    The difference is taken first, so a large logit costs no digits. Where the result is a normal number the exponent is
    at least -126: its roundings leave a relative error below 8e-6 at the far end and of 1e-7 near the top.
    """
    distance = tl.maximum(logits - top, -LARGE)
    power = tl.exp2(tl.fma(distance, scale_high, distance * scale_low))
    return tl.where(logits == NEGATIVE_INFINITY, 0.0, power)
