"""The score cache says what the scorer says, without a model."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import EXPERTS
from tests.laws.ensembles import DUPLICATES, LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.score import CHUNK
from token_swarm.errors import BadParameter, ExpertFault, FailedPrecondition, PromptTooLong, UnknownName
from token_swarm.experts.contract import EncodedPrompt, Expert, Op, StepResult
from token_swarm.experts.toy import ToyExpert
from token_swarm.experts.transformers import TransformersExpert
from token_swarm.particle import Mixture, Rule
from token_swarm.search.score_cache import SHARD, Detail, ExpertKey, ScoreCache, fill, filled, model_identity
from token_swarm.search.scoring import LawReader, Passage
from token_swarm.search.utilities import LogLikelihood, bits_per_byte

VOCABULARIES = [NESTED, DUPLICATES, LONG]
PASSAGES = [
    Passage("", "abcab"),
    Passage("ab", "cabcaabc"),
    Passage("ab", "c"),
    Passage("ab", "aaa", chat=True),
    Passage("aba", "bcabcabcaaaabcb" * 6),
    *(Passage("c" * i, "abc"[i % 3] * (i + 1)) for i in range(SHARD)),
]
MIXTURES = [
    Mixture({"e0": 1.0}, Rule.LINEAR),
    Mixture({"e0": 3.0, "e1": 1.0, "e2": 2.0}, Rule.LINEAR),
    Mixture({"e0": 0.0, "e1": 0.3, "e2": 0.7}, Rule.LINEAR),
    Mixture({"e1": 1.0}),
    Mixture({"e0": 0.4, "e1": 0.9, "e2": -0.4}),
    Mixture({"e2": 1.3, "e0": 0.8}, temperatures={"e0": 1.0}),
]


class Counting:
    """Counts the steps and the tokens an expert is asked for, and may stop working."""

    def __init__(self, inner: Expert, fail_after: int = 10**9) -> None:
        self.inner, self.spec, self.encode, self.tokenize = inner, inner.spec, inner.encode, inner.tokenize
        self.steps = self.tokens = 0
        self.fail_after = fail_after

    def step(self, ops: Sequence[Op]) -> StepResult:
        self.steps += 1
        self.tokens += sum(len(getattr(op, "tokens", ())) for op in ops)
        if self.steps > self.fail_after:
            raise ConnectionError("the plug was pulled")
        return self.inner.step(ops)

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def experts() -> dict[str, Expert]:
    return toys(VOCABULARIES)


def build(
    root: Path, experts: dict[str, Expert], passages: Sequence[Passage] = PASSAGES, tries: Path | None = None
) -> ScoreCache:
    return ScoreCache(root, [fill(root, expert, passages, tries=tries) for expert in experts.values()], passages)


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


def test_passages_of_one_prompt_share_its_forward() -> None:
    prompt, texts = "abcabcabcab" * 9, ["aab", "bcab", "cc"]
    passages = [Passage(prompt, text) for text in texts]
    together, apart = Counting(ToyExpert("e0", NESTED)), Counting(ToyExpert("e0", NESTED))
    shared = [read.laws for read in LawReader(together).read(passages)]
    single = [next(iter(LawReader(apart).read([passage]))).laws for passage in passages]
    for left, right in zip(shared, single, strict=True):
        assert np.array_equal(left, right)
    assert together.tokens < apart.tokens / 2
    assert not together.inner._held  # type: ignore[attr-defined]


def test_what_is_there_is_not_read_again(tmp_path: Path) -> None:
    expert = Counting(ToyExpert("e0", NESTED))
    calls: list[tuple[int, int]] = []
    key = fill(tmp_path, expert, PASSAGES, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(SHARD, len(PASSAGES)), (len(PASSAGES), len(PASSAGES))]
    steps = expert.steps
    assert fill(tmp_path, expert, PASSAGES) == key
    assert expert.steps == steps
    assert filled(tmp_path, PASSAGES, "e0", "") == key
    assert filled(tmp_path, PASSAGES, "e0", "other weights") is None
    assert filled(tmp_path, PASSAGES[1:], "e0", "") is None


def test_filling_resumes_where_it_stopped(tmp_path: Path) -> None:
    whole, broken = Counting(ToyExpert("e0", NESTED)), Counting(ToyExpert("e0", NESTED))
    expected = build(tmp_path / "whole", {"e0": whole}).score([Mixture({"e0": 1.0})])
    broken.fail_after = whole.steps - 3
    with pytest.raises(ConnectionError):
        fill(tmp_path / "broken", broken, PASSAGES)
    key = ExpertKey.of(broken.spec)
    assert filled(tmp_path / "broken", PASSAGES, "e0", "") is None
    with pytest.raises(FailedPrecondition, match="'e0' has not read all"):
        ScoreCache(tmp_path / "broken", [key], PASSAGES)
    again = Counting(ToyExpert("e0", NESTED))
    cache = build(tmp_path / "broken", {"e0": again})
    assert again.steps < whole.steps / 2
    assert np.array_equal(cache.score([Mixture({"e0": 1.0})]), expected)


@pytest.mark.parametrize("damage", ["cut", "garbage", "other"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    expert = ToyExpert("e0", NESTED)
    expected = build(tmp_path, {"e0": expert}).score([Mixture({"e0": 1.0})])
    first, second = sorted(tmp_path.rglob("*.safetensors"))
    if damage == "cut":
        second.write_bytes(second.read_bytes()[:-10])
    elif damage == "garbage":
        second.write_bytes(b"not a tensor")
    else:
        shutil.copyfile(first, second)
    assert np.array_equal(build(tmp_path, {"e0": expert}).score([Mixture({"e0": 1.0})]), expected)


def test_other_experts_and_other_data_have_files_of_their_own(tmp_path: Path) -> None:
    mixture = [Mixture({"e0": 1.0})]
    scores = {
        float(build(tmp_path, {"e0": ToyExpert("e0", vocabulary, seed=1)}).score(mixture)[0, 4])
        for vocabulary in (NESTED, LONG)
    }
    key = fill(tmp_path, ToyExpert("e0", NESTED, seed=2), PASSAGES, source="seed 2")
    scores.add(float(ScoreCache(tmp_path, [key], PASSAGES).score(mixture)[0, 4]))
    assert len(scores) == 3
    with pytest.raises(FailedPrecondition):
        ScoreCache(tmp_path, [key], PASSAGES[1:])
    with pytest.raises(FailedPrecondition):
        ScoreCache(tmp_path, [replace(key, dtype="torch.float16")], PASSAGES)


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
    ("detail", "mixtures"), [(Detail.MASSES, LINEAR_IN_A_GROUP), (Detail.ROWS, [*LINEAR_IN_A_GROUP, *WITH_ROWS])]
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
            assert figure == pytest.approx(expected, abs=1e-7 * passage.size)
    for low, high in ((0, 1), (1, len(mixtures))):
        assert np.array_equal(cache.score(mixtures[low:high], [4, SHARD]), cached[low:high, [2, 4]])


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
    with pytest.raises(BadParameter, match=r"e0, e2: they share a vocabulary .*across vocabularies"):
        cache.score([Mixture({"e0": 0.5, "e1": 0.5, "e2": 0.5})])
    with pytest.raises(BadParameter, match=r"temperatures\[e1\].*reshapes tokens; across vocabularies"):
        cache.score([Mixture({"e0": 0.5, "e1": 0.5}, temperatures={"e1": 1.2})])
    with pytest.raises(BadParameter, match=r"temperatures\[e1\].*reshapes tokens.*Detail\.ROWS"):
        cache.score([Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR, temperatures={"e1": 1.2})])
    with pytest.raises(BadParameter, match=r"weights\[e1\].*single expert.*Detail\.ROWS"):
        cache.score([Mixture({"e1": 0.5})])
    with pytest.raises(UnknownName, match="e7"):
        cache.score([Mixture({"e7": 1.0})])
    # Only what is run counts.
    cache.score([Mixture({"e0": 0.5, "e1": 0.5, "e2": 0.0}, temperatures={"e2": 3.0})])


def test_more_detail_is_added_to_what_is_there(tmp_path: Path) -> None:
    expert = Counting(ToyExpert("e0", NESTED))
    key = fill(tmp_path, expert, PASSAGES)
    plain = ScoreCache(tmp_path, [key], PASSAGES).score([Mixture({"e0": 1.0})])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.safetensors")}
    assert filled(tmp_path, PASSAGES, "e0", "", Detail.MASSES) is None
    assert fill(tmp_path, expert, PASSAGES, detail=Detail.ROWS) == key
    assert filled(tmp_path, PASSAGES, "e0", "", Detail.ROWS) == key
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    cache = ScoreCache(tmp_path, [key], PASSAGES)
    assert np.array_equal(cache.score([Mixture({"e0": 1.0})]), plain)
    # A power of 1 by way of the rows is the expert itself.
    assert cache.score([Mixture({"e0": 1.0 + 1e-12})]) == pytest.approx(plain, abs=1e-5)


def test_rows_that_are_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match=r"logit rows of e0: '0\.00 GB'.*the limit"):
        fill(tmp_path, ToyExpert("e0", NESTED), PASSAGES, detail=Detail.ROWS, rows_limit=100)
    assert LawReader(ToyExpert("e0", NESTED)).row_bytes([Passage("", "abcabc")]) == 2 * NESTED.width * 8
    assert not list(tmp_path.rglob("*.safetensors"))


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
    with pytest.raises(PromptTooLong, match="e0"):
        fill(tmp_path, ToyExpert("e0", NESTED, max_context=8), PASSAGES)
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


def test_a_text_that_an_expert_rules_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpertFault, match=r"byte 1 of the text 'cb' has probability 0"):
        fill(tmp_path, Excluding("e0", NESTED), [Passage("", "ac"), Passage("", "cb")])
    passages = [Passage("", "ac")]
    cache = build(tmp_path, {"e0": Excluding("e0", NESTED), "e1": ToyExpert("e1", LONG)}, passages)
    assert torch.isneginf(cache.log_probs()[:, 0, ord("b")]).all()
    mixture = Mixture({"e0": -0.2, "e1": 1.2})
    expected = LocalEnsemble({"e0": Excluding("e0", NESTED), "e1": ToyExpert("e1", LONG)}).score("", "ac", mixture)
    assert cache.score([mixture])[0, 0] == pytest.approx(expected.log_prob, abs=1e-5)


def test_a_model_is_known_by_its_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(3 << 20))
    first = model_identity(str(model))
    assert model_identity(str(model)) == first
    (model / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"1")
    second = model_identity(str(model))
    (model / "config.json").write_text("[]")
    assert len({first, second, model_identity(str(model)), model_identity("owner/name")}) == 4
    assert model_identity("owner/name") == "owner/name"


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
