"""The score cache says what the scorer says, without a model."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import EXPERTS
from tests.laws.ensembles import DUPLICATES, LONG, NESTED, toys
from tests.search.cached_passages import MIXTURES, PASSAGES, VOCABULARIES, Counting, build
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.score import CHUNK
from token_swarm.errors import BadParameter, ExpertFault, UnknownName
from token_swarm.experts.contract import EncodedPrompt, Expert
from token_swarm.experts.toy import ToyExpert
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.particle import Mixture, Rule
from token_swarm.search.score_cache.cache import SHARD, Detail, ExpertKey, ScoreCache, fill, filled
from token_swarm.search.score_cache.reader import Passage
from token_swarm.search.utilities import LogLikelihood, bits_per_byte


@pytest.fixture
def experts() -> dict[str, Expert]:
    return toys(VOCABULARIES)


def test_a_cached_score_is_the_scorers(tmp_path: Path, experts: dict[str, Expert]) -> None:
    cache, local = build(tmp_path, experts), LocalEnsemble(experts)
    cached = cache.score(MIXTURES)
    for mixture, row in zip(MIXTURES, cached, strict=True):
        for passage, figure in zip(PASSAGES, row, strict=True):
            if not passage.chat:
                expected = local.score(passage.prompt, passage.text, mixture)
                assert figure == pytest.approx(expected.log_prob, abs=1e-5 * passage.size)


def test_a_chat_prompt_is_rendered(tmp_path: Path, experts: dict[str, Expert]) -> None:
    plain, chat = build(tmp_path, experts, [Passage("ab", "aaa"), Passage("ab", "aaa", chat=True)]).score(
        [Mixture({"e0": 1.0})]
    )[0]
    assert plain != chat


def test_any_choice_of_passages_has_the_same_scores(tmp_path: Path, experts: dict[str, Expert]) -> None:
    cache = build(tmp_path, experts)
    everything = cache.score(MIXTURES)
    chosen = [SHARD + 2, 3, 0, SHARD - 1, SHARD, 3]
    assert cache.score(MIXTURES, chosen) == pytest.approx(everything[:, chosen], abs=1e-12)
    assert cache.score(MIXTURES, []).shape == (len(MIXTURES), 0)
    for start in range(0, len(PASSAGES), 5):
        run = list(range(start, min(start + 5, len(PASSAGES))))
        assert cache.score(MIXTURES, run) == pytest.approx(everything[:, run], abs=1e-12)


@pytest.mark.parametrize("rule", list(Rule))
def test_a_score_does_not_depend_on_its_company(tmp_path: Path, experts: dict[str, Expert], rule: Rule) -> None:
    cache = build(tmp_path, experts)
    table = np.random.default_rng(0).random((23, 3))
    mixtures = [Mixture({f"e{i}": w for i, w in enumerate(row)}, rule) for row in table.tolist()]
    together = cache.score(mixtures)
    for low, high in ((0, 1), (1, 3), (3, 23)):
        assert np.array_equal(cache.score(mixtures[low:high]), together[low:high])


def test_its_tensors_are_laws(tmp_path: Path, experts: dict[str, Expert]) -> None:
    cache = build(tmp_path, experts)
    chosen = [4, SHARD + 1]
    laws, targets, masses, offsets = (
        cache.log_probs(chosen),
        cache.targets(chosen),
        cache.masses(chosen),
        cache.offsets(chosen),
    )
    positions = int(cache.sizes[chosen].sum())
    assert laws.shape == (positions, 3, 257)
    assert masses.shape == (3, positions)
    assert offsets.tolist() == [0, cache.sizes[4], positions]
    assert torch.allclose(laws.double().exp().sum(2), torch.ones(positions, 3, dtype=torch.float64), atol=1e-6)
    at_target = laws[torch.arange(positions), :, targets]
    assert torch.allclose(at_target.double(), masses.T.log(), atol=1e-5)
    assert bytes(targets.tolist()).decode() == PASSAGES[4].text + PASSAGES[SHARD + 1].text


def test_the_token_figure_is_the_scorers(tmp_path: Path, experts: dict[str, Expert]) -> None:
    cache, local = build(tmp_path, experts), LocalEnsemble(experts)
    figures = cache.token_log_probs()
    for index, passage in enumerate(PASSAGES):
        for column, name in enumerate(experts):
            if not passage.chat:
                own = local.score(passage.prompt, passage.text, Mixture({name: 1.0})).experts[name]
                assert figures[column, index] == pytest.approx(own.token_log_prob, abs=1e-9)


def test_a_long_text_is_read_in_pieces(tmp_path: Path) -> None:
    expert = ToyExpert("e0", NESTED, seed=3)
    passage = Passage("a", "abcbca" * CHUNK)
    cache = build(tmp_path, {"e0": expert}, [passage])
    expected = LocalEnsemble({"e0": expert}).score("a", passage.text, Mixture({"e0": 1.0}))
    assert expected.experts["e0"].tokens > 2 * CHUNK
    assert cache.score([Mixture({"e0": 1.0})])[0, 0] == pytest.approx(expected.log_prob, abs=1e-3)
    assert torch.allclose(cache.masses()[0].log(), torch.tensor(expected.per_byte, dtype=torch.float64), atol=1e-10)


def test_it_travels_to_another_process(tmp_path: Path, experts: dict[str, Expert]) -> None:
    cache = build(tmp_path, experts)
    assert np.array_equal(pickle.loads(pickle.dumps(cache)).score(MIXTURES), cache.score(MIXTURES))


SHARED = [NESTED, LONG, NESTED, NESTED]
"""e0, e2 and e3 form one group."""
LINEAR_IN_A_GROUP = [
    Mixture({"e0": 1.0, "e2": 3.0}, Rule.LINEAR),
    Mixture({"e0": 0.2, "e1": 0.5, "e2": 0.1, "e3": 0.2}, Rule.LINEAR),
    Mixture({"e1": 0.4, "e3": 0.6, "e0": 0.0}, Rule.LINEAR),
]
ACROSS_GROUPS = [
    Mixture({"e0": 0.3, "e2": 0.4, "e1": 0.5}),
    Mixture({"e0": 0.7, "e2": 0.2, "e3": -0.3, "e1": 0.6}),
    Mixture({"e0": 0.5, "e2": -0.5, "e1": 1.0}),
    Mixture({"e0": 0.6, "e1": 0.5}, temperatures={"e1": 1.7}),
    Mixture({"e0": 0.3, "e2": 0.4, "e1": 0.5}, temperatures={"e0": 0.6, "e2": 1.4, "e1": 0.8}),
    Mixture({"e0": 0.3, "e2": 0.0, "e1": 0.5}),
    Mixture({"e0": -0.2, "e2": -0.1, "e1": 1.2}),
]
"""Log-linear, several groups, members of one group or temperatures: mixed by tokens, then by bytes."""
WITH_ROWS = [
    Mixture({"e0": 0.4, "e2": 0.9}),
    Mixture({"e0": 1.4, "e2": -0.9, "e3": 0.2}),
    Mixture({"e0": 0.5, "e2": -0.5}),
    Mixture({"e1": 0.6}),
    Mixture({"e1": 1.0}, temperatures={"e1": 1.7}),
    Mixture({"e0": 0.4, "e2": 0.9}, temperatures={"e2": 0.5}),
    Mixture({"e0": 0.4, "e1": 0.9}, Rule.LINEAR, {"e1": 0.5}),
    Mixture({"e0": 0.4, "e2": 0.3, "e1": 0.9}, Rule.LINEAR, {"e0": 1.5}),
]


@pytest.mark.parametrize(
    ("detail", "mixtures"),
    [(Detail.MASSES, LINEAR_IN_A_GROUP), (Detail.ROWS, [*LINEAR_IN_A_GROUP, *WITH_ROWS, *ACROSS_GROUPS])],
)
def test_what_is_mixed_token_by_token_is_the_scorers_too(
    tmp_path: Path, detail: Detail, mixtures: list[Mixture]
) -> None:
    experts = toys(SHARED)
    keys = [fill(tmp_path, expert, PASSAGES, detail=detail) for expert in experts.values()]
    cache, local = ScoreCache(tmp_path, keys, PASSAGES), LocalEnsemble(experts)
    assert not cache.bytewise
    chosen = [0, 1, 4, SHARD - 1, SHARD]
    cached = cache.score(mixtures, chosen)
    for mixture, row in zip(mixtures, cached, strict=True):
        for index, figure in zip(chosen, row, strict=True):
            passage = PASSAGES[index]
            expected = local.score(passage.prompt, passage.text, mixture).log_prob
            assert figure == pytest.approx(expected, abs=(1e-6 if mixture in ACROSS_GROUPS else 1e-7) * passage.size)
    for low, high in ((0, 1), (1, len(mixtures))):
        assert np.array_equal(cache.score(mixtures[low:high], [4, SHARD]), cached[low:high, [2, 4]])


def test_an_expert_that_is_alone_in_its_group_needs_no_rows(tmp_path: Path) -> None:
    experts = toys(SHARED)
    passages = PASSAGES[:6]
    keys = [
        fill(tmp_path, expert, passages, detail=Detail.BYTES if name == "e1" else Detail.ROWS)
        for name, expert in experts.items()
    ]
    cache, local = ScoreCache(tmp_path, keys, passages), LocalEnsemble(experts)
    for mixture in (ACROSS_GROUPS[0], ACROSS_GROUPS[1], LINEAR_IN_A_GROUP[1]):
        expected = [local.score(own.prompt, own.text, mixture).log_prob for own in passages if not own.chat]
        chosen = [i for i, own in enumerate(passages) if not own.chat]
        assert cache.score([mixture], chosen)[0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(BadParameter, match=r"temperatures\[e1\]"):
        cache.score([ACROSS_GROUPS[3]])
    assert np.array_equal(
        pickle.loads(pickle.dumps(cache)).score(ACROSS_GROUPS[:2]), cache.score(ACROSS_GROUPS[:2])
    )


def test_a_prompt_that_ends_inside_a_word_is_mixed_token_by_token(tmp_path: Path) -> None:
    experts = toys([DUPLICATES, DUPLICATES])
    passages = [Passage(prompt, text) for prompt in ("a", "ca", "cab", "bbab") for text in ("b", "c", "bcab", "abca")]
    keys = [fill(tmp_path, expert, passages, detail=Detail.ROWS) for expert in experts.values()]
    cache, local = ScoreCache(tmp_path, keys, passages), LocalEnsemble(experts)
    for mixture in (Mixture({"e0": 0.3, "e1": 0.7}, Rule.LINEAR), Mixture({"e0": 0.3, "e1": 0.9})):
        expected = [local.score(passage.prompt, passage.text, mixture).log_prob for passage in passages]
        assert cache.score([mixture])[0] == pytest.approx(expected, abs=1e-9)


def test_what_bytes_do_not_carry_is_refused(tmp_path: Path) -> None:
    cache = build(tmp_path, toys([NESTED, LONG, NESTED]))
    with pytest.raises(BadParameter, match=r"e0, e2: they share a vocabulary .*Detail\.MASSES"):
        cache.score([Mixture({"e0": 0.5, "e2": 0.5}, Rule.LINEAR)])
    with pytest.raises(BadParameter, match=r"e0, e2: they share a vocabulary .*Detail\.ROWS"):
        cache.score([Mixture({"e0": 0.5, "e2": 0.5})])
    with pytest.raises(BadParameter, match=r"e0, e2: they share a vocabulary .*cache of e0, e2 with Detail\.ROWS"):
        cache.score([Mixture({"e0": 0.5, "e1": 0.5, "e2": 0.5})])
    with pytest.raises(BadParameter, match=r"temperatures\[e1\].*reshapes tokens.*cache of e1 with Detail\.ROWS"):
        cache.score([Mixture({"e0": 0.5, "e1": 0.5}, temperatures={"e1": 1.2})])
    with pytest.raises(BadParameter, match=r"temperatures\[e1\].*reshapes tokens.*Detail\.ROWS"):
        cache.score([Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR, temperatures={"e1": 1.2})])
    with pytest.raises(BadParameter, match=r"weights\[e1\].*single expert.*Detail\.ROWS"):
        cache.score([Mixture({"e1": 0.5})])
    with pytest.raises(UnknownName, match="e7"):
        cache.score([Mixture({"e7": 1.0})])
    # Only what is run counts.
    cache.score([Mixture({"e0": 0.5, "e1": 0.5, "e2": 0.0}, temperatures={"e2": 3.0})])


class Blind(ToyExpert):
    """Reads no prompt, so that no token of it is taken back."""

    def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        return EncodedPrompt((7,), 0)


def test_members_that_read_a_passage_differently_are_refused(tmp_path: Path) -> None:
    passages = [Passage("a", "bcab")]
    experts = [ToyExpert("e0", NESTED), Blind("e1", NESTED)]
    keys = [fill(tmp_path, expert, passages, detail=Detail.MASSES) for expert in experts]
    with pytest.raises(BadParameter, match=r"passages\[0\]: 'bcab'.* e0, e1 read alike"):
        ScoreCache(tmp_path, keys, passages).score([Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR)])


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="at least one passage"):
        ScoreCache(tmp_path, [ExpertKey.of(ToyExpert("e0", NESTED).spec)], [])
    with pytest.raises(BadParameter, match="at least one, each name once"):
        ScoreCache(tmp_path, [], PASSAGES)
    with pytest.raises(ExpertFault, match="max_sequences"):
        fill(tmp_path, ToyExpert("e0", NESTED, max_sequences=1), PASSAGES)


class Excluding(ToyExpert):
    """Never writes the letter b."""

    def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
        rows = super().law(tokens)
        for token, text in enumerate(self.spec.vocabulary.token_bytes):
            if text is not None and b"b" in text:
                rows[token] = -torch.inf
        return rows


def test_a_passage_that_an_expert_cannot_read_is_left_out(tmp_path: Path) -> None:
    """Too long, impossible, or not to be written in its vocabulary: the others are scored all the same."""
    passages = [Passage("", "ac"), Passage("", "cb"), Passage("a", "ca"), Passage("", "a" * 40), Passage("", "ac?")]
    experts = {"e0": Excluding("e0", NESTED, max_context=30), "e1": ToyExpert("e1", LONG)}
    cache = build(tmp_path, experts, passages)
    assert {index: expert for index, (expert, _) in cache.left_out.items()} == {1: "e0", 3: "e0", 4: "e0"}
    reasons = [reason for _, reason in cache.left_out.values()]
    assert "byte 1 of the text 'cb' has probability 0" in reasons[0]
    assert re.search(r"text: .*41 tokens of expert e0.*at most its context of 30 tokens", reasons[1])
    assert "b'?'" in reasons[2]
    mixture, local = Mixture({"e0": 0.4, "e1": 0.5}), LocalEnsemble(experts)
    expected = [local.score(passages[i].prompt, passages[i].text, mixture).log_prob for i in (0, 2)]
    assert cache.score([mixture], [0, 2])[0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(BadParameter, match=r"passages: 1 .*e0 could not: .*probability 0"):
        cache.score([mixture])
    # A longer context is noticed; what is wrong for good is not read again.
    assert filled(tmp_path, passages, "e0", "") is None
    longer = Counting(Excluding("e0", NESTED, max_context=100))
    cache = build(tmp_path, {"e0": longer, "e1": experts["e1"]}, passages)
    assert list(cache.left_out) == [1, 4]
    assert filled(tmp_path, passages, "e0", "") is not None


def test_data_that_an_expert_cannot_read_at_all_is_refused(tmp_path: Path) -> None:
    passages = [Passage("", "a" * 40), Passage("", "b" * 50)]
    with pytest.raises(BadParameter, match=r"passages: '2 of them' .* that e0 can read: text: .*context of 8"):
        fill(tmp_path, ToyExpert("e0", NESTED, max_context=8), passages)
    fill(tmp_path, ToyExpert("e0", NESTED, max_context=80), passages)


def test_what_an_expert_excludes_is_excluded(tmp_path: Path) -> None:
    passages = [Passage("", "ac")]
    cache = build(tmp_path, {"e0": Excluding("e0", NESTED), "e1": ToyExpert("e1", LONG)}, passages)
    assert torch.isneginf(cache.log_probs()[:, 0, ord("b")]).all()
    mixture = Mixture({"e0": -0.2, "e1": 1.2})
    expected = LocalEnsemble({"e0": Excluding("e0", NESTED), "e1": ToyExpert("e1", LONG)}).score("", "ac", mixture)
    assert cache.score([mixture])[0, 0] == pytest.approx(expected.log_prob, abs=1e-5)


def test_log_likelihood_is_nats_per_byte(tmp_path: Path, experts: dict[str, Expert]) -> None:
    cache = build(tmp_path, experts)
    utility = LogLikelihood(cache)
    scores = utility.evaluate(MIXTURES)
    assert utility.smooth
    assert utility.items == len(PASSAGES)
    assert scores.utility() == pytest.approx(cache.score(MIXTURES).sum(1) / cache.sizes.sum())
    assert bits_per_byte(scores)[0] == pytest.approx(-scores.utility()[0] / np.log(2))
    some = utility.evaluate(MIXTURES, [4, 2])
    assert some.values == pytest.approx(scores.values[:, [4, 2]], abs=1e-12)
    assert some.utility() == pytest.approx(scores.take([4, 2]).utility(), abs=1e-12)
    with pytest.raises(IndexError, match="items"):
        utility.evaluate(MIXTURES, [len(PASSAGES)])


@pytest.mark.real_experts
def test_real_experts_too(tmp_path: Path, real_expert: Callable[[str], TransformersExpert]) -> None:
    data = Path(__file__).parents[1] / "data"
    code = (data / "module.py.txt").read_text(encoding="utf-8")
    passages = [Passage("", code[:160]), Passage(code[160:207], code[207:300])]
    experts: dict[str, Expert] = {name: real_expert(name) for name in ("smollm2", "gemma3")}
    tries = EXPERTS.parent / "tries"
    cache, local = build(tmp_path, experts, passages, tries), LocalEnsemble(experts, tries)
    for mixture in (
        Mixture({"smollm2": 0.3, "gemma3": 0.7}, Rule.LINEAR),
        Mixture({"smollm2": 0.9, "gemma3": 0.4}),
        Mixture({"gemma3": 1.0}),
    ):
        for index, passage in enumerate(passages):
            expected = local.score(passage.prompt, passage.text, mixture).bits_per_byte()
            cached = -cache.score([mixture], [index])[0, 0] / np.log(2) / passage.size
            assert cached == pytest.approx(expected, abs=1e-4)
