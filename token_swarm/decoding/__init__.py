"""Decoding: the decoder and the scorer, which do no I/O, and `LocalEnsemble`, which runs them in this process.

A decoder says which forwards it needs and is resumed with their logits; `ensemble` builds the mixing unit that it asks.
"""

from typing import TYPE_CHECKING

from token_swarm.lazy import attach

if TYPE_CHECKING:
    from token_swarm.decoding.decoder import Decoder, Finish
    from token_swarm.decoding.ensemble import Ensemble
    from token_swarm.decoding.in_process import LocalEnsemble
    from token_swarm.decoding.request import DecodeRequest, FinishReason
    from token_swarm.decoding.score import Score, Scorer

__all__ = [
    "DecodeRequest",
    "Decoder",
    "Ensemble",
    "Finish",
    "FinishReason",
    "LocalEnsemble",
    "Score",
    "Scorer",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "DecodeRequest": "token_swarm.decoding.request",
        "Decoder": "token_swarm.decoding.decoder",
        "Ensemble": "token_swarm.decoding.ensemble",
        "Finish": "token_swarm.decoding.decoder",
        "FinishReason": "token_swarm.decoding.request",
        "LocalEnsemble": "token_swarm.decoding.in_process",
        "Score": "token_swarm.decoding.score",
        "Scorer": "token_swarm.decoding.score",
    },
)
