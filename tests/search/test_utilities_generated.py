"""Utilities that judge generated text: rules, rewards, and the sharing of texts and prompts."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.conftest import save_small_tokenizer
from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.experts.contract import Close, Expert, Op, Open, OpErrorKind, Rows, StepResult
from token_swarm.experts.toy import ToyExpert
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule
from token_swarm.search.data import AnswerExample, PatternExample, PromptExample
from token_swarm.search.utilities import (
    NUMBER,
    ExactMatch,
    Generations,
    PrefixSharing,
    Regex,
    Reward,
    SequenceClassifier,
    load_function,
    local_generate,
)

MIXTURES = [Mixture({"e0": 1.0}), Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR), Mixture({"e0": 1.4, "e1": -0.4})]
REQUEST = DecodeRequest(max_bytes=6, seed=5)


class Written:
    """Stands in for an ensemble: its texts are given by prompt; counts the calls."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts, self.calls = texts, 0
        self.seeds: list[int] = []
        self.broken: str | None = None

    def __call__(self, prompt: str, mixture: Mixture, request: DecodeRequest, chat: bool) -> str:
        self.calls += 1
        self.seeds.append(request.seed)
        if prompt == self.broken:
            raise ConnectionError("gone")
        return self.texts[prompt] + (" chat" if chat else "")


def answer(text: str, right: list[str], **options: object) -> float:
    examples = [AnswerExample(prompt="q", answers=right)]
    utility = ExactMatch(examples, Generations(Written({"q": text}), REQUEST), **options)  # type: ignore[arg-type]
    return float(utility.evaluate(MIXTURES[:1]).utility()[0])


@pytest.mark.parametrize(
    ("text", "right", "options", "expected"),
    [
        (" 18\n", ["18"], {}, 1.0),
        ("18.", ["18"], {}, 0.0),
        ("Paris", ["paris"], {}, 0.0),
        ("Paris", ["Lyon", "paris"], {"ignore_case": True}, 1.0),
        ("9 + 9 is 18. So #### 1,018", ["1018"], {"extract": NUMBER, "numeric": True}, 1.0),
        ("it is 18.0", ["18"], {"extract": NUMBER, "numeric": True}, 1.0),
        ("it is 18 or 19", ["18"], {"extract": NUMBER, "numeric": True}, 0.0),
        ("no idea", ["18"], {"extract": NUMBER, "numeric": True}, 0.0),
        ("#### 7 (or 8)", ["7"], {"extract": r"#### (\d+)"}, 1.0),
        ("eighteen", ["18"], {"numeric": True}, 0.0),
    ],
)
def test_exact_match(text: str, right: list[str], options: dict[str, object], expected: float) -> None:
    assert answer(text, right, **options) == expected


def test_exact_match_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(BadParameter, match="extract"):
        answer("", ["1"], extract="(")
    with pytest.raises(BadParameter, match="numbers"):
        answer("", ["eighteen"], numeric=True)


def test_regex() -> None:
    texts = Written({"a": "in 1984 it", "b": "never"})
    examples = [PatternExample(prompt=prompt, pattern=r"\b\d{4}\b") for prompt in "ab"]
    scores = Regex(examples, Generations(texts, REQUEST)).evaluate(MIXTURES)
    assert scores.values.tolist() == [[1.0, 0.0]] * 3


def test_a_text_is_written_once(tmp_path: Path) -> None:
    written = Written({"a": "x", "b": "y"})
    examples = [PatternExample(prompt=prompt, pattern="x") for prompt in "ab"]
    utility = Regex(examples, Generations(written, REQUEST, folder=tmp_path))
    first = utility.evaluate(MIXTURES, [0])
    assert written.calls == 3
    utility.evaluate(MIXTURES)
    assert written.calls == 6
    again = Regex(examples, Generations(written, REQUEST, folder=tmp_path))
    assert again.evaluate(MIXTURES).values[:, :1].tolist() == first.values.tolist()
    assert written.calls == 6
    # A damaged file is written again.
    for path in tmp_path.rglob("*.json"):
        path.write_text("{")
    Regex(examples, Generations(written, REQUEST, folder=tmp_path)).evaluate(MIXTURES)
    assert written.calls == 12
    assert json.loads(next(tmp_path.rglob("*.json")).read_text())["text"] in ("x", "y")


def key(prompt: str = "a", mixture: Mixture = MIXTURES[1], chat: bool = False, **changes: object) -> str:
    settings: dict[str, object] = {"fingerprints": {"e0": "1"}, "request": REQUEST, **changes}
    generations = Generations(Written({}), **settings)  # type: ignore[arg-type]
    return generations._key(PromptExample(prompt=prompt, chat=chat), mixture)


def test_what_changes_a_text_changes_its_key() -> None:
    keys = [
        key(),
        key(prompt="b"),
        key(chat=True),
        key(mixture=Mixture({"e0": 0.5, "e1": 0.6}, Rule.LINEAR)),
        key(mixture=Mixture({"e0": 0.5, "e1": 0.5})),
        key(mixture=Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR, {"e0": 2.0})),
        key(fingerprints={"e0": "2"}),
        key(request=DecodeRequest(max_bytes=6, seed=6)),
        key(request=DecodeRequest(max_bytes=7, seed=5)),
        key(request=DecodeRequest(max_bytes=6, seed=5, sampling=Sampling(top_p=0.9))),
    ]
    assert len(set(keys)) == len(keys)
    same = [
        key(mixture=Mixture({"e1": 1.0, "e0": 1.0}, Rule.LINEAR)),
        key(mixture=Mixture({"e0": 0.5, "e1": 0.5, "e2": 0.0}, Rule.LINEAR, {"e2": 3.0})),
        key(fingerprints={"e0": "1", "e9": "other"}),
    ]
    assert set(same) == {keys[0]}


def test_texts_of_earlier_versions_are_found() -> None:
    """Their keys: no text on disk is written again because something was renamed."""
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    request = DecodeRequest(sampling=sampling, seed=5, max_bytes=6, stop=(b"x", b"\n"), unit=Unit.BYTE)
    mixture = Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR)
    first = key(mixture=mixture, request=request)
    assert first == "af16882f0e35a99fb96929ffc4a939fad5908fbb3f9a452f829a30ec2f4f3f74"
    second = key(mixture=mixture, request=DecodeRequest(max_bytes=6, seed=5))
    assert second == "37aa105e33415a4d5c053ad5c2b95ea2a2ef06b7633c58e0ab693fa456ad623a"


def test_every_mixture_draws_with_the_same_numbers() -> None:
    written = Written({"a": "x", "b": "y"})
    generations = Generations(written, REQUEST)
    Regex([PatternExample(prompt=prompt, pattern="x") for prompt in "ab"], generations).evaluate(MIXTURES)
    assert len(set(written.seeds)) == 2
    assert written.seeds[:3] == [generations.seed(PromptExample(prompt="a"))] * 3
    other = Generations(written, DecodeRequest(max_bytes=6, seed=6))
    assert other.seed(PromptExample(prompt="a")) != written.seeds[0]


def test_finished_texts_survive_an_error(tmp_path: Path) -> None:
    written = Written({"a": "x", "b": "y"})
    written.broken = "b"
    examples = [PatternExample(prompt=prompt, pattern="x") for prompt in "ab"]
    utility = Regex(examples, Generations(written, REQUEST, folder=tmp_path))
    with pytest.raises(ConnectionError):
        utility.evaluate(MIXTURES[:1])
    written.broken, written.calls = None, 0
    utility.evaluate(MIXTURES[:1])
    assert written.calls == 1


def test_several_at_one_time() -> None:
    together = threading.Barrier(3, timeout=20)

    def generate(prompt: str, mixture: Mixture, request: DecodeRequest, chat: bool) -> str:
        together.wait()  # passes only when three calls are under way
        return prompt

    examples = [PatternExample(prompt=prompt, pattern="a") for prompt in "abcabc"]
    generations = Generations(generate, REQUEST, concurrency=3)
    assert Regex(examples, generations).evaluate(MIXTURES[:1]).values.tolist() == [[1.0, 0, 0, 1, 0, 0]]
    assert generations.written == 3
    with pytest.raises(BadParameter, match="concurrency"):
        Generations(generate, REQUEST, concurrency=0)


def test_an_ensemble_writes_what_it_generates() -> None:
    local = LocalEnsemble(toys([NESTED, LONG]))
    generations = Generations(local_generate(local), REQUEST)
    example = PromptExample(prompt="abcab")
    for mixture in MIXTURES:
        request = DecodeRequest(max_bytes=6, seed=generations.seed(example))
        (text,) = generations.texts([(example, mixture)])
        assert text == local.generate("abcab", mixture, request)[0]


class Recording:
    """Passes steps on and counts the tokens that are opened."""

    def __init__(self, inner: Expert) -> None:
        self.inner, self.spec, self.encode, self.tokenize = inner, inner.spec, inner.encode, inner.tokenize
        self.opened = 0
        self.fail = False

    def step(self, ops: Sequence[Op]) -> StepResult:
        if self.fail:
            raise RuntimeError("out of memory")
        self.opened += sum(len(op.tokens) for op in ops if isinstance(op, Open))
        return self.inner.step(ops)

    def close(self) -> None:
        self.inner.close()


def test_a_prompt_is_read_once_for_all_mixtures() -> None:
    prompt = "abcabcabcabcab" * 4
    plain = {name: Recording(expert) for name, expert in toys([NESTED, LONG]).items()}
    inner = {name: Recording(expert) for name, expert in toys([NESTED, LONG]).items()}
    texts = []
    for experts in (plain, {name: PrefixSharing(expert) for name, expert in inner.items()}):
        generate = local_generate(LocalEnsemble(experts))
        mixtures = [Mixture({"e0": w, "e1": 1 - w}) for w in (0.2, 0.4, 0.6, 0.8)]
        texts.append([generate(prompt, mixture, REQUEST, False) for mixture in mixtures])
    assert texts[0] == texts[1]
    assert 0 < inner["e0"].opened < plain["e0"].opened / 3


def open_rows(expert: Expert, *ops: Op) -> list[torch.Tensor]:
    result = expert.step(ops)
    assert result.errors == (None,) * len(ops)
    return [result.rows(i) for i in range(len(ops))]


def test_prefix_sharing_is_the_expert_itself() -> None:
    toy = ToyExpert("e0", NESTED, max_sequences=7)
    shared = PrefixSharing(toy, keep=2)
    assert shared.spec.max_sequences == 5
    prompts = [tuple((i + j) % 5 for j in range(12)) for i in range(4)]
    for prompt in (*prompts, prompts[3], prompts[0]):
        (row, _) = open_rows(shared, Open(1, prompt), Close(1))
        assert torch.equal(row[0], toy.law(prompt))
    # More prefixes in one step than are kept, a short one, every row, and no row.
    ops = (*(Open(i, prompt) for i, prompt in enumerate(prompts)), Open(9, (1, 2), Rows.ALL))
    rows = open_rows(shared, *ops)
    for prompt, row in zip(prompts, rows, strict=False):
        assert torch.equal(row[0], toy.law(prompt))
    assert rows[4].shape == (2, NESTED.width)
    assert open_rows(shared, Close(9), Open(9, prompts[0], Rows.NONE), Close(9))[1].shape[0] == 0


def test_prefix_sharing_reports_what_the_expert_refuses() -> None:
    shared = PrefixSharing(ToyExpert("e0", NESTED, max_sequences=3, max_context=20), keep=1)
    tokens = tuple([1] * 12)
    first, second, third, long = shared.step(
        [Open(1, tokens), Open(1, tokens), Open(2, tokens), Open(3, tokens * 2)]
    ).errors
    assert first is None
    assert second is not None
    assert second.kind is OpErrorKind.SEQUENCE_EXISTS
    assert third is None
    assert long is not None
    assert long.kind in (OpErrorKind.CONTEXT_FULL, OpErrorKind.NO_FREE_SEQUENCE)
    with pytest.raises(BadParameter, match="keep"):
        PrefixSharing(ToyExpert("e0", NESTED, max_sequences=2))


def test_a_failed_forward_forgets_the_prefixes() -> None:
    toy = ToyExpert("e0", NESTED)
    recording = Recording(toy)
    shared = PrefixSharing(recording)
    tokens = tuple([1] * 12)
    open_rows(shared, Open(1, tokens), Close(1))
    recording.fail = True
    with pytest.raises(RuntimeError):
        shared.step([Open(1, tokens)])
    toy.close()  # as an expert does whose forward fails
    recording.fail = False
    (row, _) = open_rows(shared, Open(1, tokens), Close(1))
    assert torch.equal(row[0], toy.law(tokens))


def length(prompt: str, text: str) -> float:
    return len(text) - len(prompt)


def test_any_function_is_a_reward() -> None:
    written = Written({"a": "xyz", "b": "y"})
    examples = [PromptExample(prompt=prompt) for prompt in "ab"]
    function = load_function(f"{__name__}:length")
    assert Reward(examples, Generations(written, REQUEST), function).evaluate(MIXTURES).values.tolist() == [[2, 0]] * 3
    broken = Reward(examples, Generations(written, REQUEST), lambda prompt, text: float("nan"))
    with pytest.raises(ValueError, match=r"reward: nan .* finite"):
        broken.evaluate(MIXTURES)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("length", "module:function"),
        ("no_such_module:f", "No module named"),
        ("math:no_such_function", "no_such_function"),
        ("math:pi", "a function, not float"),
    ],
)
def test_a_function_that_is_not_there_is_named(reference: str, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        load_function(reference)


def save_classifier(directory: Path, labels: int) -> Path:
    config = BertConfig(
        vocab_size=save_small_tokenizer(directory, 300),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=labels,
        initializer_range=1.0,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    BertForSequenceClassification(config).save_pretrained(directory)
    return directory


def test_a_classifier_is_a_reward(tmp_path: Path) -> None:
    one = SequenceClassifier(save_classifier(tmp_path / "one", 1))
    assert one("the cat", " sat") == one("the", " cat sat")
    assert one("the cat", " sat") != one("the cat", " ate")
    # Too long for the model: the end is what counts.
    end = "and the rat ate the cat on the mat and the hat" * 2
    assert one("the hat " * 20, end) == one("a", "b " * 30 + end)
    three = save_classifier(tmp_path / "three", 3)
    total = sum(torch.tensor(SequenceClassifier(three, label)("the", " cat")).exp() for label in range(3))
    assert float(total) == pytest.approx(1.0, abs=1e-5)
    assert SequenceClassifier(three, "LABEL_2")("the", " cat") == SequenceClassifier(three, 2)("the", " cat")
    with pytest.raises(BadParameter, match="LABEL_0, LABEL_1, LABEL_2"):
        SequenceClassifier(three, "good")
