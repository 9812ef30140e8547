"""Token Swarm: mixes the next-token distributions of several language models, whatever their tokenizers.

This package runs an ensemble in one process and never does network I/O; `token_swarm_server` adds processes. The names
below are its public face; importing the package alone imports nothing else.
"""

from typing import TYPE_CHECKING

from token_swarm.lazy import attach

if TYPE_CHECKING:
    from token_swarm.decoding.in_process import LocalEnsemble
    from token_swarm.decoding.request import DecodeRequest
    from token_swarm.mixing.sampling import Sampling
    from token_swarm.particle import Mixture, Particle, Rule

__all__ = [
    "DecodeRequest",
    "LocalEnsemble",
    "Mixture",
    "Particle",
    "Rule",
    "Sampling",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "DecodeRequest": "token_swarm.decoding.request",
        "LocalEnsemble": "token_swarm.decoding.in_process",
        "Mixture": "token_swarm.particle",
        "Particle": "token_swarm.particle",
        "Rule": "token_swarm.particle",
        "Sampling": "token_swarm.mixing.sampling",
    },
)
