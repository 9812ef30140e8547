"""Laws 7 and 9: heads add up to the text, lanes hold what they say, and streams split no character."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.ensembles import GREEDY, LONG, NESTED, VOCABULARIES, byte_unit, settle, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.lanes import LaneTable, common_prefix
from token_swarm.decoding.request import DecodeRequest, FinishReason
from token_swarm.decoding.text import StopMatcher, Utf8Stream
from token_swarm.experts.contract import Op, OpError, OpErrorKind, StepResult
from token_swarm.experts.toy import ToyExpert
from token_swarm.mixing.byte_group import ByteGroup
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule
from token_swarm.vocabulary import Vocabulary


def require_whole(group: ByteGroup, vocabulary: Vocabulary, context: tuple[int, ...], prompt_tail: bytes) -> None:
    text = bytes(group.text)
    assert text.startswith(prompt_tail)
    for head in group.heads:
        assert head.tokens[: len(context)] == context
        committed = vocabulary.text(head.tokens[len(context) :])
        assert committed + text[head.start :] == text
        if head.law is not None:
            assert group.trie.find(text[head.start :]) == head.node


@pytest.mark.parametrize("name", VOCABULARIES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_committed_and_pending_bytes_are_the_text(name: str, data: st.DataObject) -> None:
    """Law 7 for heads: after any advances and forks, and independent of what other forks do."""
    experts = toys([VOCABULARIES[name]])
    local = LocalEnsemble(experts)
    unit = byte_unit(local, Mixture({"e0": 1.0}), "cab", DecodeRequest(epsilon=0.05), kind=ByteUnit)
    assert isinstance(unit.states[0], ByteGroup)
    context = unit.states[0].heads[0].tokens
    tail = bytes(unit.states[0].text)
    group, forks = unit.states[0], []
    for action in data.draw(st.lists(st.sampled_from("abcF"), max_size=12)):
        settle(local, experts, unit)
        if action == "F":
            forks.append((group.fork(), group.law()))
        else:
            unit.advance(ord(action))
        require_whole(group, VOCABULARIES[name], context, tail)
    for fork, law in forks:
        require_whole(fork, VOCABULARIES[name], context, tail)
        np.testing.assert_array_equal(fork.law(), law)


@given(
    histories=st.lists(
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=3, unique=True),
        min_size=1,
        max_size=8,
    ),
    limit=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_lane_returns_the_row_of_its_history(histories: list[list[tuple[int, ...]]], limit: int) -> None:
    """Law 7 for KV: whatever was forked, cut and extended, the row is that of a fresh prefill."""
    expert = ToyExpert("e0", Vocabulary((b"a", b"b", b"c"), ()), max_sequences=limit)
    ids = iter(range(1000))
    table = LaneTable(lambda: next(ids), limit)
    for wanted in histories:
        plan = table.plan(wanted, keep=lambda first=wanted[0]: first)
        result = expert.step(plan.ops)
        assert result.errors == (None,) * len(plan.ops)
        placed = 0
        for tokens, index in zip(wanted, plan.rows, strict=True):
            if index is not None:
                assert result.rows(index)[0].equal(expert.law(tokens))
                placed += 1
        assert placed >= min(limit, len(wanted)) >= 1
    expert.step(table.close())
    assert not expert._held


@given(st.lists(st.integers(0, 1), max_size=9).map(tuple), st.lists(st.integers(0, 1), max_size=9).map(tuple))
def test_common_prefix(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    expected = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    assert common_prefix(left, right) == expected


class Forgetful(ToyExpert):
    """Loses everything it holds at every fifth step, as a restarted process does."""

    steps = 0

    def step(self, ops: Sequence[Op]) -> StepResult:
        self.steps += 1
        if self.steps % 5 == 0:
            self._held.clear()
        return super().step(ops)


@pytest.mark.parametrize("rule", list(Rule))
def test_a_text_survives_an_expert_that_forgets(rule: Rule) -> None:
    request = DecodeRequest(sampling=Sampling(), seed=3, max_bytes=40, epsilon=0.01)
    mixture = Mixture({"e0": 0.5, "e1": 0.5}, rule)
    undisturbed, _ = LocalEnsemble(toys([NESTED, LONG])).generate("ab", mixture, request)
    forgetful = Forgetful("e1", LONG, seed=2)
    disturbed, _ = LocalEnsemble({**toys([NESTED]), "e1": forgetful}).generate("ab", mixture, request)
    assert disturbed == undisturbed
    assert forgetful.steps > 5


def test_no_kv_is_left_behind() -> None:
    experts = toys([NESTED, LONG], max_sequences=2)
    local = LocalEnsemble(experts)
    for seed in range(5):
        decoder = local.decoder("ab", Mixture({"e0": 0.5, "e1": 0.5}), DecodeRequest(seed=seed, max_bytes=20))
        list(local.pieces(decoder))
        assert all(not expert._held for expert in experts.values())  # type: ignore[attr-defined]


def test_a_full_context_ends_the_text() -> None:
    endless = Vocabulary((b"a", b"b", b"ab"), ())
    experts = {
        "e0": ToyExpert("e0", endless, max_context=12),
        "e1": ToyExpert("e1", NESTED, max_context=64),
    }
    for mixture in (Mixture({"e0": 1.0}), Mixture({"e0": 1.0, "e1": 1e-9}, Rule.LINEAR)):
        text, finish = LocalEnsemble(experts).generate("ab", mixture, DecodeRequest(sampling=GREEDY))
        assert finish.reason is FinishReason.CONTEXT_FULL
        assert 11 <= len(text) <= 24


def test_an_unknown_error_of_an_expert_is_a_fault() -> None:
    class Refusing(ToyExpert):
        def step(self, ops: Sequence[Op]) -> StepResult:
            result = super().step(ops)
            error = OpError(OpErrorKind.NO_FREE_SEQUENCE, "no free sequence")
            return StepResult(result.logits, result.spans, (error,) * len(ops))

    local = LocalEnsemble({"e0": Refusing("e0", NESTED)})
    with pytest.raises(RuntimeError, match="'e0': no free sequence"):
        local.generate("ab", Mixture({"e0": 1.0}), DecodeRequest(max_bytes=3))


# Law 9.


@given(st.text(max_size=40), st.data())
def test_a_stream_gives_whole_characters_and_all_of_them(text: str, data: st.DataObject) -> None:
    stream, out, rest = Utf8Stream(), "", text.encode()
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        piece = stream.push(rest[:size])
        assert "�" not in piece or "�" in text
        out, rest = out + piece, rest[size:]
    assert out == text
    assert stream.incomplete == 0


def test_a_cut_character_is_not_shown() -> None:
    vocabulary = Vocabulary(("é".encode(), "𝄞".encode(), b"x"), ())
    experts = {"e0": ToyExpert("e0", vocabulary, seed=1)}
    for limit in range(1, 20):
        text, finish = LocalEnsemble(experts).generate("x", Mixture({"e0": 1.0}), DecodeRequest(max_bytes=limit))
        assert "�" not in text
        assert len(text.encode()) == finish.length <= limit
        assert limit - finish.length < 4


@given(
    st.binary(max_size=30).map(lambda raw: bytes(97 + b % 2 for b in raw)),
    st.lists(st.text("ab", min_size=1, max_size=4).map(str.encode), min_size=1, max_size=3),
    st.data(),
)
def test_stop_strings_match_however_the_text_arrives(text: bytes, stops: list[bytes], data: st.DataObject) -> None:
    matcher, seen, shown = StopMatcher(stops), bytearray(), 0
    rest = text
    while rest and matcher.matched is None:
        size = data.draw(st.integers(1, len(rest)))
        seen += rest[:size]
        showable = matcher.push(seen, size)
        assert showable >= shown or matcher.matched is None
        shown, rest = max(shown, showable), rest[size:]
    hits = [text.find(stop) for stop in stops if stop in text]
    if matcher.matched is None:
        assert not hits
        assert shown <= len(text)
    else:
        first = seen.find(matcher.matched)
        assert first == min(seen.find(stop) for stop in stops if stop in seen)
        assert shown <= first or shown == first


def test_max_tokens_ends_the_text_at_a_token() -> None:
    pairs, letters = Vocabulary((b"ab", b"cd", b"abcd"), ()), Vocabulary((b"a", b"b", b"c", b"d"), ())
    experts = {"e0": ToyExpert("e0", pairs, seed=1), "e1": ToyExpert("e1", letters, seed=2)}
    for limit in (1, 3, 8):
        request = DecodeRequest(max_tokens=limit, seed=limit)
        for mixture in (Mixture({"e0": 1.0}), Mixture({"e0": 0.5, "e1": 0.5})):
            text, finish = LocalEnsemble(experts).generate("ab", mixture, request)
            assert finish.reason is FinishReason.MAX_TOKENS
            assert min(use.tokens for use in finish.experts.values()) == limit
            assert len(text) % 2 == 0
