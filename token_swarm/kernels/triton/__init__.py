"""The kernels for GPUs, in Triton: the functions of `reference`, on CUDA tensors (or on CPU tensors under
TRITON_INTERPRET=1, which has to be set before Triton is imported). The package `triton` is optional: import this one
only where it is installed.
"""

from token_swarm.kernels.triton.mix import mix
from token_swarm.kernels.triton.prefix import prefix_mass
from token_swarm.kernels.triton.sampling import choose, sample
from token_swarm.kernels.triton.scoring import score_linear, score_log_linear
from token_swarm.kernels.triton.shaping import shape
from token_swarm.kernels.triton.union import mix_union

__all__ = ["choose", "mix", "mix_union", "prefix_mass", "sample", "score_linear", "score_log_linear", "shape"]
