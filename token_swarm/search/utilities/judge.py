"""A language model as the judge: a score of 1 to 10 for each text, from an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from token_swarm.errors import BadParameter
from token_swarm.files import replacing
from token_swarm.search.data import PromptExample
from token_swarm.search.utilities.generation import GeneratedUtility, Generations
from token_swarm.search.utilities.judge_reply import HIGHEST, LOWEST, parse_score
from token_swarm.search.utilities.kind import Judging, WrittenKind
from token_swarm.search.utility import UtilityUnavailable

logger = logging.getLogger(__name__)

INSTRUCTION = (
    "You grade an assistant's answer. Judge how helpful, correct and well written it is, on a scale from 1 (useless) "
    "to 10 (perfect). Reply with one line and nothing else: Score: <integer from 1 to 10>"
)
_UNREAD = 3
"""Replies without a score of which an excerpt is kept."""
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class JudgeSettings:
    """Where the judge is and what it costs.

    url: of the API, such as http://127.0.0.1:8000/v1. key_variable: the environment variable that holds the key, if one
    is needed. retries: further attempts when it does not answer, and when it answers without a score. Prices are per
    million tokens; budget: the search stops when the costs have reached it.
    """

    url: str
    model: str
    instruction: str = INSTRUCTION
    key_variable: str | None = None
    retries: int = 3
    timeout: float = 60.0
    max_tokens: int = 256
    """Room for a judge that explains itself before it gives its score."""
    prompt_price: float = 0.0
    completion_price: float = 0.0
    budget: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no request could be made with."""
        if not self.url.startswith(("http://", "https://")):
            raise BadParameter("url", self.url, "an address that starts with http:// or https://")
        if self.retries < 0:
            raise BadParameter("retries", self.retries, "an integer >= 0")
        if not self.timeout > 0:
            raise BadParameter("timeout", self.timeout, "seconds > 0")


@dataclass
class JudgeUsage:
    """What the judge was asked and what that cost.

    unparsed: texts that it gave no score, which count as the lowest; unread: excerpts of its replies to the first few.
    """

    requests: int = 0
    retries: int = 0
    unparsed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    unread: list[str] = field(default_factory=list)

    @property
    def note(self) -> str | None:
        """What a user should know of it, in a line; None where every text got a score."""
        if not self.unparsed:
            return None
        texts = "1 text" if self.unparsed == 1 else f"{self.unparsed} texts"
        return f"the judge gave {texts} no score, counted as {LOWEST}; it said: {'; '.join(self.unread)}"


@dataclass
class JudgeClient:
    """Asks the judge, and keeps its answers in `folder`."""

    settings: JudgeSettings
    folder: Path | None = None
    sleep: Callable[[float], None] = time.sleep
    usage: JudgeUsage = field(default_factory=JudgeUsage)
    _unparsed_in_a_row: int = 0
    _memory: dict[str, int] = field(default_factory=dict)

    def score(self, prompt: str, text: str, reference: str = "") -> int:
        """1 to 10. A reply without a score, after the retries, counts as 1.

        Raises UtilityUnavailable when the judge does not answer, refuses, never gives a score, or is too expensive.
        """
        messages = self._messages(prompt, text, reference)
        key = hashlib.sha256(json.dumps([self.settings.model, messages]).encode()).hexdigest()
        if (known := self._find(key)) is not None:
            return known
        for attempt in range(self.settings.retries + 1):
            reply = self._ask(messages)
            if (score := parse_score(reply)) is not None:
                self._unparsed_in_a_row = 0
                self._keep(key, score, reply)
                return score
            self.usage.retries += attempt < self.settings.retries
        excerpt = f"{_excerpt(reply)} of the answer {_excerpt(text)} to {_excerpt(prompt)}"
        logger.warning("judge %s: no score can be read from %s; it counts as %d", self.settings.model, excerpt, LOWEST)
        self.usage.unparsed += 1
        if len(self.usage.unread) < _UNREAD:
            self.usage.unread.append(excerpt)
        self._unparsed_in_a_row += 1
        if self._unparsed_in_a_row == 5:
            raise UtilityUnavailable(
                f"judge {self.settings.model}: five texts in a row without a score; its last reply was {reply[:80]!r}"
            )
        self._memory[key] = LOWEST
        return LOWEST

    def _messages(self, prompt: str, text: str, reference: str) -> list[dict[str, str]]:
        parts = [f"[Question]\n{prompt}"]
        if reference:
            parts.append(f"[A good answer]\n{reference}")
        parts.append(f"[The assistant's answer]\n{text}")
        system = {"role": "system", "content": self.settings.instruction}
        return [system, {"role": "user", "content": "\n\n".join(parts)}]

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        settings = self.settings
        if settings.budget is not None and self.usage.cost >= settings.budget:
            raise UtilityUnavailable(f"judge {settings.model}: its budget of {settings.budget} is spent")
        body = {"model": settings.model, "messages": messages, "temperature": 0, "max_tokens": settings.max_tokens}
        headers = {"Content-Type": "application/json"}
        if settings.key_variable is not None:
            if settings.key_variable not in os.environ:
                raise UtilityUnavailable(f"judge: the environment variable {settings.key_variable} is not set")
            headers["Authorization"] = f"Bearer {os.environ[settings.key_variable]}"
        address = f"{settings.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(settings.retries + 1):
            self.usage.requests += 1
            try:
                with urllib.request.urlopen(request, timeout=settings.timeout) as response:
                    return self._content(response.read())
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.read(200).decode(errors='replace')}".strip()
                if error.code not in _RETRIED:
                    raise UtilityUnavailable(f"judge at {address} refuses: {reason}") from error
            except (OSError, HTTPException, _BadReply) as error:
                reason = str(error) or type(error).__name__
            if attempt < settings.retries:
                self.usage.retries += 1
                self.sleep(min(2.0**attempt, 30.0))
        raise UtilityUnavailable(f"judge at {address} does not answer after {settings.retries + 1} attempts: {reason}")

    def _content(self, data: bytes) -> str:
        try:
            document: Any = json.loads(data)
            content = document["choices"][0]["message"]["content"] or ""
            usage = document.get("usage") or {}
            prompt, completion = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _BadReply(f"not a chat completion: {data[:80]!r}") from error
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        settings = self.settings
        self.usage.cost += (prompt * settings.prompt_price + completion * settings.completion_price) / 1e6
        return str(content)

    def _find(self, key: str) -> int | None:
        if key not in self._memory and self.folder is not None:
            try:
                score = json.loads((self.folder / key[:2] / f"{key}.json").read_text(encoding="utf-8"))["score"]
            except (OSError, ValueError, LookupError, TypeError):
                return None
            if isinstance(score, int) and LOWEST <= score <= HIGHEST:
                self._memory[key] = score
        return self._memory.get(key)

    def _keep(self, key: str, score: int, reply: str) -> None:
        self._memory[key] = score
        if self.folder is not None:
            with replacing(self.folder / key[:2] / f"{key}.json") as file:
                file.write(json.dumps({"score": score, "reply": reply}, ensure_ascii=False).encode())


class _BadReply(ValueError):
    """What came back is no chat completion."""


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


class Judge(GeneratedUtility[PromptExample]):
    """The judge's score of each text, 1 to 10."""

    def __init__(self, examples: Sequence[PromptExample], generations: Generations, client: JudgeClient) -> None:
        super().__init__("judge", examples, generations)
        self.client = client

    def judge(self, example: PromptExample, text: str) -> float:
        """See `JudgeClient.score`."""
        return float(self.client.score(example.prompt, text, example.reference))


def _make(examples: Sequence[PromptExample], texts: Generations, judging: Judging) -> Judge:
    """Raises BadParameter for a judge that is missing."""
    if judging.judge is None:
        raise BadParameter("judge", None, "the address and the name of a model that judges")
    folder = None if texts.folder is None else texts.folder.parent / "judgements"
    return Judge(examples, texts, JudgeClient(judging.judge, folder))


KIND = WrittenKind(PromptExample, _make)
