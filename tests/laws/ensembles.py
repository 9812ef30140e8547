"""Small vocabularies and experts that the laws are checked on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.contract import Expert
from token_swarm.experts.toy import ToyExpert
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture
from token_swarm.vocabulary import Vocabulary

NESTED = Vocabulary((b"a", b"b", b"ab", b"abc", b"c", b"bc", None, None), eos_ids=(6,))
"""Nested prefixes; 7 is a special token."""
DUPLICATES = Vocabulary((b"a", b"a", b"ab", b"ab", b"b", b"c", b"abc", None, None, None), eos_ids=(7, 8))
"""Equal byte strings under several ids, two end-of-text ids."""
BYTES = Vocabulary((b"a", b"b", b"c", None), eos_ids=(3,))
LONG = Vocabulary((b"a", b"b", b"c", b"aa", b"aaa", b"aab", b"abcabc", b"ca", b"cab", None), eos_ids=(9,))
VOCABULARIES = {"nested": NESTED, "duplicates": DUPLICATES, "bytes": BYTES, "long": LONG}

EXACT = DecodeRequest(epsilon=0.0, window=None)


def toys(vocabularies: Sequence[Vocabulary], **options: float) -> dict[str, Expert]:
    """One toy expert a vocabulary, named e0, e1, ..."""
    return {f"e{i}": ToyExpert(f"e{i}", vocabulary, seed=i + 1, **options) for i, vocabulary in enumerate(vocabularies)}


def byte_unit(
    local: LocalEnsemble,
    mixture: Mixture,
    prompt: str,
    request: DecodeRequest = EXACT,
    *,
    keep_tail: bool = False,
    kind: type[ByteUnit] | None = None,
) -> ByteUnit:
    """A byte unit, even for one group. `keep_tail` leaves the prompt's last token committed.

    kind: which implementation, if not the one that is in use.
    """
    prompts = local.encode(mixture, prompt)
    if keep_tail:
        prompts = {name: type(encoded)(encoded.tokens, 0) for name, encoded in prompts.items()}
    groups = local.ensemble.groups(mixture)
    if kind is None:
        return local.ensemble.byte_unit(groups, request, prompts)
    window = request.window if request.epsilon > 0 else None
    return kind(
        groups, local.ensemble.tries, prompts, request.sampling, epsilon=request.epsilon, window=window
    )


def settle(local: LocalEnsemble, experts: Mapping[str, Expert], unit: ByteUnit) -> int:
    """Feed everything that is due, straight from the experts' laws; returns the number of forwards."""
    count = 0
    while needs := unit.due():
        for need in needs:
            unit.feed(need, [experts[name].law(need.tokens) for name in unit.groups[need.group].names])  # type: ignore[attr-defined]
            count += 1
    return count


def words(alphabet: str, length: int) -> list[bytes]:
    """Every text over `alphabet` up to a length."""
    return ["".join(w).encode() for n in range(length + 1) for w in itertools.product(alphabet, repeat=n)]


GREEDY = Sampling(temperature=0.0)


def total_variation(left: np.ndarray, right: np.ndarray) -> float:
    """Half the L1 distance."""
    return float(np.abs(left - right).sum() / 2)
