"""The utilities: likelihoods and choices from the score cache, and judgements of generated text.

Every one is a plain object with `evaluate`; `token_swarm.search.utility` says what that means.
"""

from token_swarm.search.utilities.likelihood import LogLikelihood, bits_per_byte

__all__ = ["LogLikelihood", "bits_per_byte"]
