"""A small quadratic program: the step of a Newton method that stays inside bounds and on the simplex."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from token_swarm.search.utility import Array

_AT_BOUND = 1e-14
_POSITIVE = 1e-12


def best_step(gradient: Array, hessian: Array, room_below: Array, room_above: Array, fixed_sum: int) -> Array:
    """The step s [d] that maximises g·s + s·H·s / 2 with -room_below <= s <= room_above.

    hessian: [d, d], negative definite; rooms: [d], not negative, may be inf; the first `fixed_sum` coordinates of s
    add up to 0. A primal active-set method (Nocedal and Wright, Numerical Optimization, algorithm 16.3), so that a
    coordinate that ends at its bound is there exactly.
    """
    size = len(gradient)
    step = np.zeros(size)
    held = np.zeros(size, dtype=np.int64)  # -1 at its lower bound, 1 at its upper bound, 0 free
    held[room_above <= _AT_BOUND] = 1
    held[room_below <= _AT_BOUND] = -1
    summed = np.arange(size) < fixed_sum
    for _ in range(50 * size):
        slope = gradient + hessian @ step
        move, multiplier = _unbounded(slope, hessian, held == 0, summed)
        if np.abs(move).max(initial=0.0) <= _AT_BOUND * (1 + np.abs(step).max(initial=0.0)):
            # Where a bound holds a coordinate back that would rather leave it, let it go, the most eager one first.
            eager = np.where(held == 0, 0.0, -(slope - multiplier * summed) * held)
            chosen = int(np.argmax(eager))
            if eager[chosen] <= _POSITIVE * (1 + np.abs(gradient).max()):
                break
            held[chosen] = 0
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.where(move < 0, (-room_below - step) / move, (room_above - step) / move)
        reach[move == 0] = np.inf
        blocking = int(np.argmin(reach))
        step = step + min(1.0, reach[blocking]) * move
        if reach[blocking] < 1.0:
            held[blocking] = -1 if move[blocking] < 0 else 1
            step[blocking] = -room_below[blocking] if move[blocking] < 0 else room_above[blocking]
    return step


def _unbounded(
    slope: Array, hessian: Array, free: npt.NDArray[np.bool_], summed: npt.NDArray[np.bool_]
) -> tuple[Array, float]:
    """The Newton step in the free coordinates whose summed ones add up to 0, and the multiplier of that sum."""
    move = np.zeros(len(slope))
    index = np.flatnonzero(free)
    bound = summed[index]
    if not bound.any():
        if len(index):
            move[index] = np.linalg.solve(hessian[np.ix_(index, index)], -slope[index])
        return move, 0.0
    size = len(index)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = hessian[np.ix_(index, index)]
    system[:size, size] = -bound.astype(np.float64)
    system[size, :size] = bound
    solution = np.linalg.solve(system, np.append(-slope[index], 0.0))
    move[index] = solution[:size]
    return move, float(solution[size])


def negative_definite(hessian: Array, damping: float) -> Array:
    """`hessian` with the signs of its curvatures made negative, and `damping` subtracted from each: [d, d]."""
    curvatures, directions = np.linalg.eigh((hessian + hessian.T) / 2)
    scale = np.abs(curvatures).max(initial=0.0)
    bent = -np.maximum(np.abs(curvatures), 1e-12 * scale + 1e-300) - damping
    return np.asarray((directions * bent) @ directions.T, dtype=np.float64)
