"""Experts: the contract between an ensemble and a model, its laws as reusable assertions, and the backends by name.

A backend lives in a package of its own (`transformers`, `vllm`) or in another distribution; see `registry`.
"""

from typing import TYPE_CHECKING

from token_swarm.lazy import attach

if TYPE_CHECKING:
    from token_swarm.experts.contract import EncodedPrompt, Expert, ExpertSpec, ExpertStats, StepResult
    from token_swarm.experts.loading import ExpertLoadError
    from token_swarm.experts.registry import BACKENDS, load_expert

__all__ = [
    "BACKENDS",
    "EncodedPrompt",
    "Expert",
    "ExpertLoadError",
    "ExpertSpec",
    "ExpertStats",
    "StepResult",
    "load_expert",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "BACKENDS": "token_swarm.experts.registry",
        "EncodedPrompt": "token_swarm.experts.contract",
        "Expert": "token_swarm.experts.contract",
        "ExpertLoadError": "token_swarm.experts.loading",
        "ExpertSpec": "token_swarm.experts.contract",
        "ExpertStats": "token_swarm.experts.contract",
        "StepResult": "token_swarm.experts.contract",
        "load_expert": "token_swarm.experts.registry",
    },
)
