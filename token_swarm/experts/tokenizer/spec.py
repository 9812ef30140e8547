"""What an ensemble must know of an expert, read off its tokenizer: the same for every backend."""

from __future__ import annotations

from typing import Any

import torch

from token_swarm.experts.contract import ExpertSpec
from token_swarm.experts.loading import ExpertLoadError
from token_swarm.experts.tokenizer.numbering import Numbering
from token_swarm.experts.tokenizer.token_bytes import (
    TokenizerError,
    canonical_digest,
    check_round_trip,
    eos_ids_of,
    vocabulary_of,
)


def expert_spec(
    name: str,
    architecture: str,
    tokenizer: Any,
    *,
    config: Any,
    generation_config: Any,
    width: int,
    dtype: torch.dtype,
    max_sequences: int,
    max_context: int,
) -> tuple[ExpertSpec, Numbering]:
    """The spec of an expert whose model has logit rows of `width`, and how its tokens are numbered.

    Both configurations say what ends a text; each may be None.

    Raises ExpertLoadError for a tokenizer that cannot take part in an ensemble.
    """
    try:
        eos_ids = eos_ids_of(config, generation_config, tokenizer)
        vocabulary = vocabulary_of(tokenizer, width=width, eos_ids=eos_ids)
        check_round_trip(tokenizer, vocabulary)
        canonical = canonical_digest(tokenizer)
    except TokenizerError as error:
        raise ExpertLoadError(f"model: {error}") from error
    numbering = Numbering(vocabulary)
    spec = ExpertSpec(
        name=name,
        architecture=architecture,
        vocabulary=numbering.vocabulary,
        canonical=canonical,
        max_context=max_context,
        max_sequences=max_sequences,
        dtype=dtype,
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
    )
    return spec, numbering
