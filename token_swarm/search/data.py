"""Evaluation data: JSONL files, one example a line, checked against the schema of what they are for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from token_swarm.errors import BadParameter
from token_swarm.files import replacing

Text = Annotated[str, Field(min_length=1)]


class DataError(ValueError):
    """Data that cannot be used. The message names the file, the line and the field; `line` counts from 1."""

    def __init__(self, source: str, line: int, field: str, message: str) -> None:
        where = f"{source}, line {line}" + (f", {field}" if field else "")
        super().__init__(f"{where}: {message}")
        self.source, self.line, self.field = source, line, field


class Example(BaseModel):
    """What every example may have; fields that the schema does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = ""
    """Names the example in reports; takes no part in anything else."""
    prompt: str = ""
    """What comes before; it is not judged itself."""
    chat: bool = False
    """The prompt is a user's turn of each expert's chat template."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the contents, without the id."""
        contents = self.model_dump(exclude={"id"})
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).digest()


class TextExample(Example):
    """A text whose probability counts: `loglikelihood`."""

    text: Text


class ChoiceExample(Example):
    """Continuations of the prompt, one of them right: `multiple-choice`."""

    choices: list[Text] = Field(min_length=2)
    answer: int = Field(ge=0)
    """Index of the right one."""

    @model_validator(mode="after")
    def _answer_exists(self) -> ChoiceExample:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer: {self.answer} is not allowed; it must be 0 to {len(self.choices) - 1}")
        return self


class PreferenceExample(Example):
    """Two continuations of which one is liked better: `preference`."""

    chosen: Text
    rejected: Text


class AnswerExample(Example):
    """A question with the answers that count as right: `exact-match`."""

    prompt: Text
    answers: list[str] = Field(min_length=1)


class PatternExample(Example):
    """A question and a regular expression that a good answer matches somewhere: `regex`."""

    prompt: Text
    pattern: Text

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class PromptExample(Example):
    """A prompt whose answer is judged: `reward` and `judge`. `reference`: a good answer, for the judge to see."""

    prompt: Text
    reference: str = ""


@dataclass(frozen=True)
class LeftOutExample:
    """An example that takes no part in a search, because `expert` cannot read it. index: in its file, from 0."""

    file: str
    index: int
    id: str
    expert: str
    reason: str

    def __str__(self) -> str:
        """In a line, for people."""
        name = f" ({self.id})" if self.id else ""
        return f"{self.file}, example {self.index + 1}{name}: expert {self.expert} cannot read it: {self.reason}"


E = TypeVar("E", bound=Example)


@dataclass(frozen=True)
class Dataset(Generic[E]):
    """Examples of one schema. `name` is used in messages."""

    name: str
    examples: tuple[E, ...]

    def __post_init__(self) -> None:
        """Refuse a set without examples."""
        if not self.examples:
            raise BadParameter(self.name, "no examples", "at least one example")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the examples in their order, ids apart."""
        return hashlib.sha256(b"".join(example.digest for example in self.examples)).hexdigest()

    def split(self, test: float = 0.5) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the (dev, test) examples; about the share `test` goes to test.

        The contents of an example decide alone, so that its side never changes, whatever else is in the file, and equal
        examples are on one side. Raises BadParameter for a share outside (0, 1), and when a side is left empty.
        """
        if not 0 < test < 1:
            raise BadParameter("test", test, "a share between 0 and 1, both excluded")
        shares = [int.from_bytes(example.digest[:8], "big") / 2**64 for example in self.examples]
        sides = {
            "dev": tuple(i for i, share in enumerate(shares) if share >= test),
            "test": tuple(i for i, share in enumerate(shares) if share < test),
        }
        for name, side in sides.items():
            if not side:
                held = f"empty: all {len(self)} examples fall on the other side"
                raise BadParameter(f"{self.name}: {name} split", held, "at least one example")
        return sides["dev"], sides["test"]

    def head(self, count: int | None) -> Dataset[E]:
        """The first `count` examples; all for None."""
        if count is not None and count < 1:
            raise BadParameter("count", count, "an integer >= 1")
        return self if count is None else Dataset(self.name, self.examples[:count])


def load_jsonl(path: Path, schema: type[E]) -> Dataset[E]:
    """Read a JSONL file. Blank lines are skipped.

    Raises DataError for the first line that is wrong, BadParameter for a file without examples, OSError.
    """
    examples = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        examples.append(_parse(line, schema, path.name, number))
    return Dataset(path.name, tuple(examples))


def save_jsonl(path: Path, examples: Sequence[Example]) -> None:
    """Write examples, what is at its default left out; a reader sees no file or the whole one."""
    with replacing(path) as file:
        for example in examples:
            line = json.dumps(example.model_dump(exclude_defaults=True), ensure_ascii=False)
            file.write(line.encode() + b"\n")


def _parse(line: bytes, schema: type[E], source: str, number: int) -> E:
    try:
        document: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(source, number, "", f"not UTF-8: byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError(source, number, "", f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(document, dict):
        raise DataError(source, number, "", f"a JSON object is needed, not {type(document).__name__}")
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"there is no such field; allowed: {', '.join(schema.model_fields)}"
        raise DataError(source, number, field, message) from error
