"""A text that outgrows a context is scored in rolling windows: every byte once, with the context that fits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.windows import SLACK, ExpertTokens, plan_windows
from token_swarm.errors import BadParameter, PromptTooLong
from token_swarm.experts.toy import ToyExpert
from token_swarm.particle import Mixture, Rule

MIXTURES = [Mixture({"e0": 0.4, "e1": 0.7}), Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR), Mixture({"e1": 1.0})]
TEXT = "abcbcaabcc" * 30


def ensemble(*contexts: int, **given) -> LocalEnsemble:
    vocabularies = (NESTED, LONG)
    return LocalEnsemble(
        {
            f"e{i}": ToyExpert(f"e{i}", vocabularies[i], seed=i, max_context=context, **given)
            for i, context in enumerate(contexts)
        }
    )


@given(
    characters=st.lists(st.sampled_from("aé東🙂 "), min_size=30, max_size=300),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=9),
    limits=st.lists(st.integers(2 * SLACK + 1, 90), min_size=1, max_size=3),
    stride=st.none() | st.integers(1, 200),
    prompt=st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_windows_hold_every_byte_once_and_fit(characters, sizes, limits, stride, prompt) -> None:
    text = "".join(characters).encode()
    experts = {}
    for i, limit in enumerate(limits):
        lengths = []
        while sum(lengths) < len(text):
            lengths.append(min(sizes[(len(lengths) + i) % len(sizes)], len(text) - sum(lengths)))
        experts[f"e{i}"] = ExpertTokens(np.cumsum(lengths), prompt, limit)
    used, windows = plan_windows(text, experts, stride)
    assert [own.start for own in windows] == [0, *(own.stop for own in windows[:-1])]
    assert windows[-1].stop == len(text)
    for own in windows:
        text[own.start : own.stop].decode()  # no character is cut
        for name, expert in experts.items():
            begin = own.contexts[name]
            tokens = expert.count(own.stop) - (0 if not begin else expert.count(begin))
            assert tokens + (prompt if begin is None else 1) <= expert.limit
            assert begin is None or begin <= own.start
            if begin is not None:
                text[begin : own.start].decode()
    for before, own in pairwise(windows):
        assert own.stop - own.start <= max(used, 4)
        # What comes before is as much as fits: one more stride of context would be too much for some expert.
        assert min(own.contexts[name] or 0 for name in experts) <= before.stop


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_each_window_is_the_score_after_its_context(mixture: Mixture) -> None:
    """Of an expert with a short and one with a long context: what a caller would get who cut the text himself."""
    local, whole = ensemble(60, 90), ensemble(4000, 4000)
    names = mixture.active
    score = local.score("ab", TEXT, mixture, stride=20)
    assert score.length == len(score.per_byte) == len(TEXT)
    assert score.stride == 20
    assert [own.start for own in score.windows] == [0, *np.cumsum([own.length for own in score.windows])[:-1]]
    assert all(own.length <= 20 for own in score.windows[1:])
    first = whole.score("ab", TEXT[: score.windows[0].length], mixture)
    assert score.per_byte[: score.windows[0].length] == pytest.approx(first.per_byte, abs=1e-9)
    if len(names) == 1:
        for own in score.windows[1:]:
            context = TEXT[own.start - own.context : own.start]
            expected = whole.score(context, TEXT[own.start : own.start + own.length], mixture)
            got = score.per_byte[own.start : own.start + own.length]
            assert got == pytest.approx(expected.per_byte, abs=1e-9)
    assert score.log_prob == pytest.approx(sum(score.per_byte))
    assert score.experts.keys() == names.keys()
    assert all(len(own.per_byte) == len(TEXT) for own in score.experts.values())


def test_an_order_that_the_context_covers_is_scored_as_by_a_long_one() -> None:
    """Experts that look two tokens back lose nothing by windows that have more before them."""
    short, long = ensemble(60, 60, order=2), ensemble(4000, 4000, order=2)
    mixture = MIXTURES[0]
    windowed, whole = short.score("", TEXT, mixture, stride=15), long.score("", TEXT, mixture)
    assert len(windowed.windows) > 5
    assert not whole.windows
    assert min(own.context for own in windowed.windows[1:]) >= 20
    assert windowed.log_prob == pytest.approx(whole.log_prob, rel=0.02)


def test_a_chat_prompt_stays_as_long_as_it_fits() -> None:
    local = ensemble(60, 400)
    score = local.score("ab", TEXT[:200], Mixture({"e0": 0.5, "e1": 0.5}), chat=True)
    assert score.length == 200
    # The default: at least half of the shortest context is before each byte.
    assert min(own.context for own in score.windows[1:]) >= 0.8 * score.stride


def test_what_cannot_be_windowed_is_named() -> None:
    local = ensemble(40, 60)
    with pytest.raises(PromptTooLong, match=r"prompt: .* tokens of expert e0.*40 tokens"):
        local.score("abc" * 60, "abc", MIXTURES[0])
    with pytest.raises(BadParameter, match=r"stride: 0 .*at least 1 byte"):
        local.score("", TEXT, MIXTURES[0], stride=0)
    with pytest.raises(BadParameter, match=r"text: .* tokens of expert e0.*at most its context of 10 tokens"):
        ensemble(10, 60).score("", TEXT, MIXTURES[0])
    with pytest.raises(BadParameter, match="text: ''"):
        local.score("ab", "", MIXTURES[0])


def test_a_text_that_fits_is_read_in_one_pass() -> None:
    score = LocalEnsemble(toys([NESTED, LONG])).score("ab", "abcabc", Mixture({"e0": 0.4, "e1": 0.7}), stride=2)
    assert (score.stride, score.windows) == (0, [])
