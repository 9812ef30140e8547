"""Reading, checking and splitting JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from token_swarm.errors import BadParameter
from token_swarm.search.data import (
    AnswerExample,
    ChoiceExample,
    DataError,
    Dataset,
    Example,
    PatternExample,
    PreferenceExample,
    PromptExample,
    TextExample,
    load_jsonl,
    save_jsonl,
)

VALID: list[tuple[type[Example], dict[str, object]]] = [
    (TextExample, {"text": "naïve 東京"}),
    (ChoiceExample, {"prompt": "2+2=", "choices": ["4", "5"], "answer": 0}),
    (PreferenceExample, {"prompt": "Hi", "chosen": " there", "rejected": " no", "chat": True}),
    (AnswerExample, {"id": "q1", "prompt": "2+2=", "answers": ["4", "four"]}),
    (PatternExample, {"prompt": "a year", "pattern": r"\b\d{4}\b"}),
    (PromptExample, {"prompt": "Tell me a joke", "reference": "Knock, knock"}),
]


@pytest.mark.parametrize(("schema", "document"), VALID)
def test_what_is_written_is_read(tmp_path: Path, schema: type[Example], document: dict[str, object]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(document) + "\n\n  \n" + json.dumps(document))
    read = load_jsonl(path, schema)
    assert len(read) == 2
    assert read.examples[0].model_dump(exclude_defaults=True) == document
    save_jsonl(tmp_path / "copy.jsonl", read.examples)
    assert load_jsonl(tmp_path / "copy.jsonl", schema).examples == read.examples


@pytest.mark.parametrize(
    ("schema", "line", "field", "message"),
    [
        (TextExample, "{", "", "not JSON: .* column 2"),
        (TextExample, "[1]", "", "a JSON object is needed, not list"),
        (TextExample, '{"text": ""}', "text", "at least 1 character"),
        (TextExample, '{"prompt": "a"}', "text", "required"),
        (TextExample, '{"text": 3}', "text", "string"),
        (TextExample, '{"text": "a", "txet": "b"}', "txet", "there is no such field; allowed: id, prompt, chat, text"),
        (ChoiceExample, '{"choices": ["a", ""], "answer": 0}', "choices.1", "at least 1 character"),
        (ChoiceExample, '{"choices": ["a"], "answer": 0}', "choices", "at least 2"),
        (ChoiceExample, '{"choices": ["a", "b"], "answer": 2}', "", "answer: 2 is not allowed; it must be 0 to 1"),
        (ChoiceExample, '{"choices": ["a", "b"], "answer": -1}', "answer", "greater than or equal to 0"),
        (ChoiceExample, '{"choices": ["a", "b"], "answer": "0"}', "answer", "integer"),
        (PreferenceExample, '{"chosen": "a"}', "rejected", "required"),
        (AnswerExample, '{"prompt": "a", "answers": []}', "answers", "at least 1"),
        (PatternExample, '{"prompt": "a", "pattern": "("}', "pattern", "not a regular expression"),
        (PromptExample, '{"reference": "a"}', "prompt", "required"),
    ],
)
def test_an_error_names_line_and_field(
    tmp_path: Path, schema: type[Example], line: str, field: str, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    good = next(document for kind, document in VALID if kind is schema)
    path.write_text(f"{json.dumps(good)}\n\n{line}\n{json.dumps(good)}\n")
    with pytest.raises(DataError, match=message) as caught:
        load_jsonl(path, schema)
    assert (caught.value.source, caught.value.line, caught.value.field) == ("data.jsonl", 3, field)
    assert str(caught.value).startswith("data.jsonl, line 3")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8: byte 10"):
        load_jsonl(path, TextExample)


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n \n")
    with pytest.raises(BadParameter, match=r"empty\.jsonl: 'no examples'"):
        load_jsonl(path, TextExample)
    with pytest.raises(FileNotFoundError):
        load_jsonl(tmp_path / "missing.jsonl", TextExample)


def texts(count: int, first: int = 0) -> list[TextExample]:
    return [TextExample(id=str(i), text=f"text {i}") for i in range(first, first + count)]


def test_a_split_depends_on_contents_alone() -> None:
    data = Dataset("d", tuple(texts(200)))
    dev, test = data.split(0.3)
    assert sorted((*dev, *test)) == list(range(200))
    assert 40 <= len(test) <= 80
    sides = {data.examples[i].text: i in test for i in range(200)}
    # Other examples around it, another order and another id change nothing.
    shuffled = [TextExample(id="x", text=e.text) for e in reversed(data.examples)] + texts(50, 1000)
    other = Dataset("o", tuple(shuffled))
    _, again = other.split(0.3)
    assert all((i in again) == sides[other.examples[i].text] for i in range(200))
    double = Dataset("twice", (*data.examples, *data.examples))
    left, right = double.split(0.3)
    assert not {double.examples[i].text for i in left} & {double.examples[i].text for i in right}


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(BadParameter, match=r"d: (dev|test) split: .*empty: all 1 examples"):
        Dataset("d", tuple(texts(1))).split()
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(BadParameter, match=r"test: .* a share between 0 and 1"):
            Dataset("d", tuple(texts(9))).split(share)


def test_the_hash_covers_contents_and_order() -> None:
    first, second = texts(2)
    hashes = {
        Dataset("d", examples).hash
        for examples in ((first, second), (second, first), (first,), (first, TextExample(text="other")))
    }
    assert len(hashes) == 4
    assert Dataset("d", (first,)).hash == Dataset("e", (TextExample(id="another id", text=first.text),)).hash


def test_head() -> None:
    data = Dataset("d", tuple(texts(5)))
    assert data.head(2).examples == data.examples[:2]
    assert data.head(None) is data
    with pytest.raises(BadParameter, match="count"):
        data.head(0)


def test_the_documented_examples_are_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    blocks = [block.split("\n```")[0] for block in text.split("```json\n")[1:]]
    assert len(blocks) == len(VALID)
    schemas = (TextExample, ChoiceExample, PreferenceExample, AnswerExample, PatternExample, PromptExample)
    for schema, block in zip(schemas, blocks, strict=True):
        path = tmp_path / "example.jsonl"
        path.write_text(block, encoding="utf-8")
        assert len(load_jsonl(path, schema)) == 1
