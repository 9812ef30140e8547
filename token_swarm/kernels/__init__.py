"""The numeric inner loops. `reference` defines them in float64; the names below run the fastest version there is."""

from token_swarm.kernels.dispatch import (
    choose,
    describe,
    mix,
    mix_union,
    prefix_mass,
    sample,
    score_linear,
    score_log_linear,
    shape,
)
from token_swarm.kernels.union_map import UnionMap

__all__ = [
    "UnionMap",
    "choose",
    "describe",
    "mix",
    "mix_union",
    "prefix_mass",
    "sample",
    "score_linear",
    "score_log_linear",
    "shape",
]
