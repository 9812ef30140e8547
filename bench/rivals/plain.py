"""Two ways to do without Token Swarm, written plainly with transformers: `python -m bench.rivals.plain`.

generate: one model by itself, `model.generate`. lockstep: the ensemble of GaC (arXiv 2406.12585) and UniTE (arXiv
2410.03777). Every step each model gives a distribution over its own tokens, the distributions are added as token
strings over the union of the vocabularies, the best string is written, and each model reads it in its own tokens. The
KV is kept, and a string that is a token of the model is not tokenized again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from bench.rivals.child import answer_commands
from token_swarm.experts.tokenizer.token_bytes import eos_ids_of, vocabulary_of


@dataclass
class Model:
    """A model, its tokenizer, and the bytes of its tokens. `column[i]`: where token i stands in the union."""

    path: str
    column: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        """Load in float32: what a CPU without native bfloat16 computes fastest."""
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        config = AutoConfig.from_pretrained(self.path)
        self.eos = eos_ids_of(config, GenerationConfig.from_pretrained(self.path), self.tokenizer)
        vocabulary = vocabulary_of(self.tokenizer, width=config.vocab_size, eos_ids=self.eos)
        self.strings = vocabulary.token_bytes
        self.ids = {string: token for token, string in reversed(list(enumerate(self.strings))) if string}

    def encode(self, prompt: str) -> list[int]:
        """The prompt with what the model wants before it."""
        tokens: list[int] = self.tokenizer.encode(prompt)
        return tokens

    def read(self, string: bytes) -> list[int]:
        """A string in the model's own tokens."""
        token = self.ids.get(string)
        if token is not None:
            return [token]
        again: list[int] = self.tokenizer.encode(string.decode(errors="replace"), add_special_tokens=False)
        return again


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Stops after `limit` bytes, and knows when each token came."""

    def __init__(self, strings: tuple[bytes | None, ...], limit: int) -> None:
        self.times: list[float] = []
        self.sizes: list[int] = []
        self._strings, self._limit = strings, limit

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called after every token."""
        del scores
        self.times.append(time.perf_counter())
        self.sizes.append(len(self._strings[int(input_ids[0, -1])] or b""))
        return torch.tensor([sum(self.sizes) >= self._limit])


def generate(model: Model, prompt: str, max_bytes: int) -> dict[str, Any]:
    """Greedy `model.generate`; times from the call on, in seconds."""
    inputs = torch.tensor([model.encode(prompt)])
    clock = _Clock(model.strings, max_bytes)
    started = time.perf_counter()
    model.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=max_bytes,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return _times(started, clock.times, clock.sizes)


class Lockstep:
    """Several models, one string at a time. parallel: the models in threads of their own, one core each."""

    def __init__(self, models: list[Model], weights: list[float], *, parallel: bool) -> None:
        self._models, self._weights = models, weights
        # OpenMP keeps its number of threads for each thread that asks.
        one = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(len(models), initializer=one) if parallel else None
        self.strings: list[bytes] = []
        numbers: dict[bytes, int] = {}
        for model in models:
            for string in model.strings:
                if string and string not in numbers:
                    numbers[string] = len(self.strings)
                    self.strings.append(string)
        self._end = len(self.strings)
        # Special tokens have no string: one column of their own, which is never read.
        for model in models:
            column = [numbers[string] if string else self._end + 1 for string in model.strings]
            for token in model.eos:
                column[token] = self._end
            model.column = torch.tensor(column)

    def generate(self, prompt: str, max_bytes: int) -> dict[str, Any]:
        """Greedy; times from the call on, in seconds."""
        started = time.perf_counter()
        caches = [DynamicCache(config=model.model.config) for model in self._models]
        new = [model.encode(prompt) for model in self._models]
        times: list[float] = []
        sizes: list[int] = []
        while sum(sizes) < max_bytes:
            union = torch.zeros(self._end + 2)
            for model, weight, law in zip(self._models, self._weights, self._laws(new, caches), strict=True):
                union.index_add_(0, model.column[: len(law)], law, alpha=weight)
            best = int(union[: self._end + 1].argmax())
            if best == self._end:
                break
            string = self.strings[best]
            times.append(time.perf_counter())
            sizes.append(len(string))
            new = [model.read(string) for model in self._models]
        return _times(started, times, sizes)

    def _laws(self, new: list[list[int]], caches: list[DynamicCache]) -> list[torch.Tensor]:
        """Every model's distribution after its new tokens: [vocab] each."""
        work = list(zip(self._models, new, caches, strict=True))
        if self._pool is None:
            return [_law(*each) for each in work]
        return [future.result() for future in [self._pool.submit(_law, *each) for each in work]]


@torch.inference_mode()
def _law(model: Model, tokens: list[int], cache: DynamicCache) -> torch.Tensor:
    logits = model.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return torch.softmax(logits[0, -1].float(), dim=-1)


def _times(started: float, times: list[float], sizes: list[int]) -> dict[str, Any]:
    """first, total: seconds; bytes of the text; rest: bytes after the first piece."""
    if not times:
        return {"first": None, "total": time.perf_counter() - started, "bytes": 0, "rest": 0, "pieces": 0}
    return {
        "first": times[0] - started,
        "total": times[-1] - started,
        "bytes": sum(sizes),
        "rest": sum(sizes[1:]),
        "pieces": len(sizes),
    }


def main() -> None:
    """Answer commands: {"do": "generate", "model": name, ...} and {"do": "lockstep", "parallel": bool, ...}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", required=True, help="JSON: directory by name")
    options = parser.parse_args()
    logging.disable_progress_bar()
    models = {name: Model(str(Path(path))) for name, path in json.loads(options.models).items()}
    weights = [1 / len(models)] * len(models)
    lockstep = {parallel: Lockstep(list(models.values()), weights, parallel=parallel) for parallel in (False, True)}

    def handle(command: Mapping[str, Any]) -> Mapping[str, Any]:
        torch.set_num_threads(command["threads"])
        prompt, max_bytes = command["prompt"], command["max_bytes"]
        if command["do"] == "generate":
            return generate(models[command["model"]], prompt, max_bytes)
        return lockstep[command["parallel"]].generate(prompt, max_bytes)

    answer_commands(handle)


if __name__ == "__main__":
    main()
