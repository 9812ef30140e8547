"""The numeric inner loops. `reference` defines them in float64; the names below run the fastest version there is."""

from token_swarm.kernels.dispatch import (
    choose,
    describe,
    mix,
    mix_union,
    prefix_mass,
    sample,
    score_byte_laws,
    score_linear,
    score_log_linear,
    shape,
    softmax_masses,
)
from token_swarm.kernels.reference import STRIDE
from token_swarm.kernels.union_map import UnionMap

__all__ = [
    "STRIDE",
    "UnionMap",
    "choose",
    "describe",
    "mix",
    "mix_union",
    "prefix_mass",
    "sample",
    "score_byte_laws",
    "score_linear",
    "score_log_linear",
    "shape",
    "softmax_masses",
]
