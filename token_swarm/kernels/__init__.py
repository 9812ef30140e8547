"""The numeric inner loops. `reference` defines them in float64; the names below are the fast versions in use."""

from token_swarm.kernels.eager import mix, prefix_mass

__all__ = ["mix", "prefix_mass"]
