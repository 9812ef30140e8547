"""The byte walk in C++ against the byte unit in Python, which the laws are proven on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.laws.ensembles import VOCABULARIES, byte_unit, settle, toys
from token_swarm.decoding.decoder import Decoder, Finish
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest, FinishReason
from token_swarm.kernels import native
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.mixing.native_unit import NativeByteUnit, byte_unit_type
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule
from token_swarm.vocabulary import Vocabulary

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C++ kernels were not built here")


def test_the_native_walk_is_the_one_in_use() -> None:
    assert byte_unit_type() is NativeByteUnit


def decode(
    local: LocalEnsemble, mixture: Mixture, request: DecodeRequest, kind: type[ByteUnit], forced: bytes | None
) -> Decoder:
    unit = byte_unit(local, mixture, "ab", request, kind=kind)
    decoder = Decoder(unit, request, allocate=local.allocate, forced=forced)
    list(local.pieces(decoder))
    return decoder


def assert_alike(left: Finish, right: Finish) -> None:
    """Equal but for the rounding of sums in another order."""
    assert left.reason is right.reason
    assert left.certificate == pytest.approx(right.certificate, rel=1e-9, abs=1e-15)
    assert left.retired == pytest.approx(right.retired, rel=1e-9, abs=1e-15)
    for name, use in left.experts.items():
        other = right.experts[name]
        assert use.share == pytest.approx(other.share, rel=1e-9, abs=1e-12)
        assert dataclasses.replace(use, share=0) == dataclasses.replace(other, share=0)


@given(
    names=st.lists(st.sampled_from(sorted(VOCABULARIES)), min_size=1, max_size=4),
    rule=st.sampled_from(list(Rule)),
    seed=st.integers(0, 2**32),
    epsilon=st.sampled_from([0.0, 0.01, 0.1, 0.4]),
    window=st.sampled_from([1, 2, 8]),
    sampling=st.sampled_from(
        [
            Sampling(temperature=0.0),
            Sampling(),
            Sampling(temperature=0.6, top_k=2),
            Sampling(top_p=0.5),
            Sampling(temperature=2.0, min_p=0.4),
        ]
    ),
    forced=st.one_of(st.none(), st.text(alphabet="abc", min_size=1, max_size=30)),
    weights=st.lists(st.floats(0.1, 1.0), min_size=4, max_size=4),
    negative=st.booleans(),
)
@example(  # a filter excludes what the script says, in the middle of a stretch
    names=["long", "bytes", "nested"],
    rule=Rule.LINEAR,
    seed=0,
    epsilon=0.1,
    window=1,
    sampling=Sampling(temperature=2.0, min_p=0.4),
    forced="aaa",
    weights=[1.0, 1.0, 1.0, 1.0],
    negative=False,
)
@settings(max_examples=60, deadline=None)
def test_both_write_the_same_text(
    names: list[str],
    rule: Rule,
    seed: int,
    epsilon: float,
    window: int,
    sampling: Sampling,
    forced: str | None,
    weights: list[float],
    negative: bool,
) -> None:
    """Same bytes, log-probabilities, shares, certificates and forwards, whatever the settings."""
    local = LocalEnsemble(toys([VOCABULARIES[name] for name in names], sharpness=2.0))
    own = {f"e{i}": weight for i, weight in enumerate(weights[: len(names)])}
    if negative and rule is Rule.LOG_LINEAR and len(own) > 1:
        own["e1"] *= -0.5
    most = 6 if epsilon == 0 else 30
    request = DecodeRequest(sampling=sampling, seed=seed, max_bytes=most, epsilon=epsilon, window=window)
    script = None if forced is None else forced.encode()
    ours, python = (decode(local, Mixture(own, rule), request, kind, script) for kind in (NativeByteUnit, ByteUnit))
    assert ours.text == python.text
    np.testing.assert_allclose(ours.log_probs, python.log_probs, rtol=1e-9, atol=1e-12)
    assert_alike(ours.finish, python.finish)


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("level", ["baseline", "AVX2", "AVX-512"])
def test_every_instruction_set_walks_alike(level: str, rule: Rule, sharpness: float) -> None:
    """Logarithms and powers are computed in another way for AVX-512; with sharp laws they are of tiny numbers."""
    local = LocalEnsemble(toys([VOCABULARIES["nested"], VOCABULARIES["long"]], sharpness=sharpness))
    mixture = Mixture({"e0": 0.7, "e1": 0.6}, rule)
    request = DecodeRequest(sampling=Sampling(), seed=5, max_bytes=40)
    python = decode(local, mixture, request, ByteUnit, b"abcbacabbc" * 4)
    try:
        native.instruction_set(at_most=level)
        ours = decode(local, mixture, request, NativeByteUnit, b"abcbacabbc" * 4)
    finally:
        native.instruction_set(at_most="AVX-512")
    assert ours.text == python.text
    np.testing.assert_allclose(ours.log_probs, python.log_probs, rtol=1e-9, atol=1e-12)
    assert_alike(ours.finish, python.finish)


@pytest.mark.parametrize("rule", Rule)
def test_members_of_a_group_share_alike(rule: Rule) -> None:
    """Two experts of one vocabulary beside one of another: each expert's share of each symbol."""
    experts = toys([VOCABULARIES["nested"], VOCABULARIES["nested"], VOCABULARIES["long"]])
    local = LocalEnsemble(experts)
    mixture = Mixture({"e0": 0.5, "e1": 0.2, "e2": 0.3}, rule)
    ours, python = (byte_unit(local, mixture, "ab", kind=kind) for kind in (NativeByteUnit, ByteUnit))
    for byte in b"abca":
        for unit in (ours, python):
            settle(local, experts, unit)
        for symbol in (*b"abc", 256):
            assert ours.shares(symbol) == pytest.approx(python.shares(symbol), rel=1e-9, abs=1e-12)
        for unit in (ours, python):
            unit.advance(byte)


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_max_tokens_ends_both_at_the_same_byte(limit: int) -> None:
    local = LocalEnsemble(toys([VOCABULARIES["nested"], VOCABULARIES["long"]]))
    request = DecodeRequest(sampling=Sampling(temperature=0.0), max_tokens=limit, max_bytes=60)
    mixture = Mixture({"e0": 0.5, "e1": 0.5})
    ours, python = (decode(local, mixture, request, kind, None) for kind in (NativeByteUnit, ByteUnit))
    assert ours.text == python.text
    assert_alike(ours.finish, python.finish)


@pytest.mark.parametrize("kind", [NativeByteUnit, ByteUnit])
def test_max_tokens_ends_a_text_that_one_group_cannot_write(kind: type[ByteUnit]) -> None:
    """A group that has no tokens for the text takes part no more, neither in the law nor in the limit."""
    without_c = Vocabulary((b"a", b"b", b"ab", None), eos_ids=(3,))
    local = LocalEnsemble(toys([without_c, VOCABULARIES["bytes"]], sharpness=0.1))
    mixture = Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR)
    request = DecodeRequest(max_tokens=4, max_bytes=50)
    forced = decode(local, mixture, request, kind, b"abcabcabc")
    assert forced.finish.reason is FinishReason.MAX_TOKENS
    assert forced.text == b"abca"
