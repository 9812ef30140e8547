"""Mixing: experts in groups of one vocabulary, and the units that mix groups by token, by byte or over a union.

Here the mixed distribution is computed: inside a group in `groups`, across groups in `byte_unit` and `union_unit`.
"""

from typing import TYPE_CHECKING

from token_swarm.lazy import attach

if TYPE_CHECKING:
    from token_swarm.mixing.byte_unit import ByteUnit
    from token_swarm.mixing.groups import Group, Unit, make_groups
    from token_swarm.mixing.sampling import Sampler, Sampling
    from token_swarm.mixing.token_unit import TokenUnit
    from token_swarm.mixing.union_unit import UnionUnit
    from token_swarm.mixing.unit import MixingUnit

__all__ = [
    "ByteUnit",
    "Group",
    "MixingUnit",
    "Sampler",
    "Sampling",
    "TokenUnit",
    "UnionUnit",
    "Unit",
    "make_groups",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "ByteUnit": "token_swarm.mixing.byte_unit",
        "Group": "token_swarm.mixing.groups",
        "MixingUnit": "token_swarm.mixing.unit",
        "Sampler": "token_swarm.mixing.sampling",
        "Sampling": "token_swarm.mixing.sampling",
        "TokenUnit": "token_swarm.mixing.token_unit",
        "UnionUnit": "token_swarm.mixing.union_unit",
        "Unit": "token_swarm.mixing.groups",
        "make_groups": "token_swarm.mixing.groups",
    },
)
