"""Groups whose laws exclude each other: the text goes on where it can, and ends with an error rather than too early."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.laws.ensembles import LONG, NESTED
from token_swarm.decoding.decoder import Decoder, Finish
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest, FinishReason
from token_swarm.errors import NoContinuation
from token_swarm.experts.toy import ToyExpert
from token_swarm.kernels import native
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.mixing.native_unit import NativeByteUnit
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture
from token_swarm.vocabulary import Vocabulary

# Without an end-of-text token: no text has a reason to end before its limit.
VOCABULARIES = (Vocabulary((*NESTED.token_bytes[:6], None), ()), Vocabulary(LONG.token_bytes[:9], ()))
MIXTURE = Mixture({"e0": 0.5, "e1": 0.5})
UNITS = [
    ByteUnit,
    pytest.param(NativeByteUnit, marks=pytest.mark.skipif(native.library() is None, reason="no C++ kernels here")),
]


def written(kind: type[ByteUnit], sampling: Sampling, seed: int = 0, sharpness: float = 8.0) -> tuple[bytes, Finish]:
    toys = {f"e{i}": ToyExpert(f"e{i}", own, seed=i, sharpness=sharpness) for i, own in enumerate(VOCABULARIES)}
    local = LocalEnsemble(toys)
    request = DecodeRequest(sampling=sampling, seed=seed, max_bytes=40)
    groups = local.ensemble.groups(MIXTURE)
    prompts = {name: toy.encode("ab") for name, toy in toys.items()}
    window = request.window
    unit = kind(groups, local.ensemble.tries, prompts, sampling, epsilon=request.epsilon, window=window)
    decoder = Decoder(unit, request, allocate=local.allocate)
    "".join(local.pieces(decoder))
    return decoder.text, decoder.finish


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=heat) for heat in (1e-3, 0.01, 0.05, 0.2)]
    + [Sampling(top_k=1), Sampling(top_p=1e-3), Sampling(min_p=1.0), Sampling(temperature=0.1, top_p=0.5)],
    ids=repr,
)
def test_no_temperature_or_filter_ends_a_text(kind: type[ByteUnit], sampling: Sampling) -> None:
    for seed in range(6):
        text, finish = written(kind, sampling, seed)
        assert (len(text), finish.reason) == (40, FinishReason.MAX_BYTES)


@pytest.mark.skipif(native.library() is None, reason="the C++ kernels were not built here")
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.01), Sampling(top_k=1)], ids=repr)
def test_both_units_go_on_alike(sampling: Sampling) -> None:
    assert written(ByteUnit, sampling, 3)[0] == written(NativeByteUnit, sampling, 3)[0]


@pytest.mark.parametrize("kind", UNITS)
def test_experts_that_exclude_each_other_end_the_text_with_an_error(kind: type[ByteUnit]) -> None:
    class Sure(ToyExpert):
        """One that gives every byte but one a probability of 0."""

        def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
            only = {"e0": b"a", "e1": b"b"}[self.spec.name]
            begins = [bool(text) and text.startswith(only) for text in self.spec.vocabulary.token_bytes]
            return torch.from_numpy(np.where(begins, 0.0, -math.inf))

    toys = {f"e{i}": Sure(f"e{i}", own) for i, own in enumerate(VOCABULARIES)}
    local = LocalEnsemble(toys)
    request = DecodeRequest(max_bytes=40)
    prompts = {name: toy.encode("ab") for name, toy in toys.items()}
    unit = kind(
        local.ensemble.groups(MIXTURE), local.ensemble.tries, prompts, Sampling(), epsilon=0.1, window=request.window
    )
    decoder = Decoder(unit, request, allocate=local.allocate)
    with pytest.raises(NoContinuation, match=r"experts e0\+e1"):
        "".join(local.pieces(decoder))
