"""Drafts compute rows early and change nothing: neither texts, nor laws, nor what an expert holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws.ensembles import BYTES, GREEDY, LONG, NESTED, toys
from token_swarm.decoding.decoder import Decoder
from token_swarm.decoding.drafts import LONGEST, PromptLookup
from token_swarm.decoding.forwards import Forwards, Outcome
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.lanes import LaneTable, Tokens
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadLogits, BadParameter
from token_swarm.experts.contract import Extend, Rows
from token_swarm.experts.toy import TextLawExpert, ToyExpert
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule
from token_swarm.vocabulary import Vocabulary

TWO = Mixture({"e0": 0.5, "e1": 0.3, "e2": 0.2}, Rule.LOG_LINEAR)
"""Two groups, one of them of two experts."""


def written(local: LocalEnsemble, mixture: Mixture, request: DecodeRequest) -> tuple[Decoder, int]:
    """The decoder of a text that has ended, and how many steps it took."""
    decoder, steps = local.decoder("cab", mixture, request), 0
    while calls := decoder.calls():
        decoder.resume(local.run(calls))
        steps += 1
    local.run(decoder.close())
    return decoder, steps


def knowing(plain: Decoder, wrong: int) -> Callable[[PromptLookup, Tokens, int], Tokens]:
    """Drafts what the text came to, with another token in every so manieth place."""
    ends = [plain.unit.history(group) for group in range(len(plain.unit.groups))]

    def draft(_: PromptLookup, history: Tokens, most: int) -> Tokens:
        for end in ends:
            if end[: len(history)] == history:
                size = len(history)
                return tuple(0 if (size + at) % wrong == 0 else token for at, token in enumerate(end[size:][:most]))
        return (0,) * most

    return draft


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize(
    ("unit", "vocabularies"),
    [(Unit.BYTE, (NESTED, LONG, LONG)), (Unit.UNION, (NESTED, LONG, LONG)), (Unit.TOKEN, (LONG, LONG, LONG))],
    ids=["byte", "union", "token"],
)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=5)], ids=["greedy", "drawn"])
def test_the_text_is_the_same_in_fewer_steps(
    unit: Unit, vocabularies: Sequence[Vocabulary], rule: Rule, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = toys(vocabularies)
    local = LocalEnsemble(experts)
    mixture = Mixture(TWO.weights, rule)
    saved = 0
    for seed in range(4):
        request = DecodeRequest(sampling=sampling, seed=seed, max_bytes=60, unit=unit)
        plain, steps = written(local, mixture, request)
        for most in (1, 3, 8):
            with monkeypatch.context() as patch:
                patch.setattr(PromptLookup, "draft", knowing(plain, wrong=4))
                found, fewer = written(local, mixture, replace(request, draft_tokens=most))
            assert found.text == plain.text
            assert found.log_probs == plain.log_probs
            assert found.finish.reason == plain.finish.reason
            assert fewer <= steps
            saved += steps - fewer
            for name, use in found.finish.experts.items():
                before = plain.finish.experts[name]
                assert (use.tokens, use.share) == (before.tokens, before.share)
                assert use.drafted >= use.accepted >= 0
                assert use.wasted >= before.wasted
                assert use.forwards - use.wasted >= before.forwards - before.wasted
                assert before.drafted == 0
    assert saved > 10, "what is drafted rightly saves steps"
    for expert in experts.values():
        assert isinstance(expert, ToyExpert)
        assert not expert._held, "KV was left behind"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8)], ids=["greedy", "drawn"])
def test_a_text_that_repeats_itself_drafts_itself(sampling: Sampling) -> None:
    """The lookup itself, of two groups."""
    turned = Vocabulary((b"c", b"b", b"a", None), eos_ids=(3,))

    def chorus(text: bytes) -> np.ndarray:
        law = np.zeros(257)
        law[list(b"abc")] = 1e-3
        law[b"abcabcab"[(len(text) * 5 // 3) % 8]] = 1.0
        return law / law.sum()

    local = LocalEnsemble({"e0": TextLawExpert("e0", turned, chorus), "e1": TextLawExpert("e1", BYTES, chorus)})
    mixture = Mixture({"e0": 0.5, "e1": 0.5})
    request = DecodeRequest(sampling=sampling, max_bytes=120)
    plain, steps = written(local, mixture, request)
    found, fewer = written(local, mixture, replace(request, draft_tokens=4))
    assert found.text == plain.text
    assert fewer < 0.7 * steps


def test_a_draft_that_is_never_right_costs_rows_and_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptLookup, "draft", lambda _self, _history, most: (7,) * most)
    local = LocalEnsemble(toys([NESTED, LONG, LONG]))
    plain, steps = written(local, TWO, DecodeRequest(sampling=GREEDY, max_bytes=40))
    found, same = written(local, TWO, DecodeRequest(sampling=GREEDY, max_bytes=40, draft_tokens=3))
    assert found.text == plain.text
    assert same == steps
    use = found.finish.experts["e0"]
    assert use.drafted > 0
    assert use.accepted == 0
    assert use.wasted == plain.finish.experts["e0"].wasted + use.drafted


def test_rows_of_another_history_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the law above: rows of a draft that are one place off."""
    local = LocalEnsemble(toys([NESTED, LONG, LONG]))
    request = DecodeRequest(sampling=GREEDY, max_bytes=60, draft_tokens=3)
    right = Forwards._keep
    monkeypatch.setattr(Forwards, "_keep", lambda self, name, placed, rows: right(self, name, placed, rows.roll(1, 0)))
    plain, _ = written(local, TWO, DecodeRequest(sampling=GREEDY, max_bytes=60))
    found, _ = written(local, TWO, request)
    assert found.log_probs != pytest.approx(plain.log_probs, rel=1e-3)


def test_an_expert_that_is_lost_reads_its_text_again_with_a_draft() -> None:
    experts = toys([NESTED, LONG, LONG])
    local = LocalEnsemble(experts)
    plain, _ = written(local, TWO, DecodeRequest(sampling=GREEDY, max_bytes=60))
    decoder, steps = local.decoder("cab", TWO, DecodeRequest(sampling=GREEDY, max_bytes=60, draft_tokens=4)), 0
    while calls := decoder.calls():
        outcomes = local.run(calls)
        steps += 1
        if steps % 3 == 0:
            outcomes.pop("e1", None)
            if "e1" in calls:
                experts["e1"].close()
        decoder.resume(outcomes)
    assert decoder.text == plain.text


def test_rows_of_a_draft_that_are_no_law_are_asked_for_again() -> None:
    local = LocalEnsemble(toys([NESTED, LONG, LONG]))
    plain, _ = written(local, TWO, DecodeRequest(sampling=GREEDY, max_bytes=60))
    decoder = local.decoder("cab", TWO, DecodeRequest(sampling=GREEDY, max_bytes=60, draft_tokens=4))
    blamed = 0
    while calls := decoder.calls():
        outcomes: dict[str, list[Outcome]] = local.run(calls)
        for index, op in enumerate(calls.get("e0", [])):
            if isinstance(op, Extend) and op.rows is Rows.ALL and blamed < 3:
                rows = outcomes["e0"][index]
                outcomes["e0"][index] = rows * float("nan")  # type: ignore[operator]
        try:
            decoder.resume(outcomes)
        except BadLogits as fault:
            blamed += fault.experts == ("e0",)
    assert blamed == 3
    assert decoder.text == plain.text


def test_a_draft_ends_where_the_context_does() -> None:
    experts = toys([NESTED, LONG], max_context=24)
    local, mixture = LocalEnsemble(experts), Mixture({"e0": 0.5, "e1": 0.5})
    plain, _ = written(local, mixture, DecodeRequest(sampling=GREEDY))
    found, _ = written(local, mixture, DecodeRequest(sampling=GREEDY, draft_tokens=8))
    assert found.text == plain.text
    assert found.finish.reason == plain.finish.reason


@given(
    histories=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=8),
    drafts=st.lists(st.lists(st.integers(0, 2), max_size=3).map(tuple), min_size=8, max_size=8),
    limit=st.integers(1, 3),
)
def test_lanes_return_the_rows_of_a_draft(
    histories: list[tuple[int, ...]], drafts: list[tuple[int, ...]], limit: int
) -> None:
    """Whatever was drafted before and not taken back, a row is that of a fresh prefill."""
    expert = ToyExpert("e0", Vocabulary((b"a", b"b", b"c"), ()), max_sequences=limit)
    ids = iter(range(1000))
    table = LaneTable(lambda: next(ids), limit)
    for tokens, draft in zip(histories, drafts, strict=False):
        plan = table.plan([tokens], keep=lambda tokens=tokens: tokens, draft=draft)
        result = expert.step(plan.ops)
        assert result.errors == (None,) * len(plan.ops)
        (index,) = plan.rows
        assert index is not None
        assert result.rows(index)[0].equal(expert.law(tokens))
        assert (plan.drafted is None) == (not draft)
        for count in range(len(draft)):
            assert plan.drafted is not None
            assert result.rows(plan.drafted)[count].equal(expert.law(tokens + draft[: count + 1]))


def test_the_longest_end_that_is_there_again_decides() -> None:
    lookup = PromptLookup()
    assert lookup.draft((), 4) == ()
    assert lookup.draft((1,), 4) == ()
    assert lookup.draft((1, 2, 3), 4) == ()
    assert lookup.draft((5, 1, 2, 9, 2, 8, 8, 1, 2), 4) == (9, 2, 8, 8), "1 2, not the later 2"
    assert lookup.draft((5, 1, 2, 9, 2, 8, 8, 1, 2), 0) == ()
    assert lookup.draft((5, 1, 2, 9, 2, 8, 8, 1, 2, 7, 5), 4) == (1, 2), "after one token, two"
    assert lookup.draft((3, 4, 6, 6, 3, 4, 7, 3, 4), 2) == (7, 3), "the last place counts"
    assert lookup.draft((1, 1, 1, 1), 4) == (1,), "what follows ends with the history"


@given(st.lists(st.lists(st.integers(0, 2), max_size=12).map(tuple), max_size=8), st.integers(0, 5))
def test_a_draft_was_read_before_in_this_very_history(histories: list[tuple[int, ...]], most: int) -> None:
    lookup = PromptLookup()
    for history in histories:
        draft = lookup.draft(history, most)
        assert len(draft) <= most
        if draft:
            sizes = range(1, min(LONGEST, len(history) - 1) + 1)
            ends = [e for e in range(1, len(history)) for n in sizes if history[max(0, e - n) : e] == history[-n:]]
            assert any(history[end : end + len(draft)] == draft for end in ends)


@pytest.mark.parametrize("value", [-1, 17])
def test_how_much_may_be_drafted_is_checked(value: int) -> None:
    with pytest.raises(BadParameter, match="draft_tokens"):
        DecodeRequest(draft_tokens=value)
