"""What a byte costs between two forwards: `python -m bench.byte_walk --help`.

Follows a text with the vocabularies of real models and made-up laws (most of the probability on the text's own next
token, the rest spread as a softmax of noise), so that only the walk is measured: laws are made and fed off the clock.
The Python byte unit walks the same text for comparison.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from token_swarm_server.benchmark.tables import Table
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from bench.common import give
from token_swarm.experts.contract import EncodedPrompt, ExpertSpec
from token_swarm.experts.tokenizer.token_bytes import eos_ids_of, vocabulary_of
from token_swarm.kernels.byte_walk import Status, walk_together
from token_swarm.mixing.byte_law import ByteLaw, LawMaker
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.mixing.defaults import DEFAULT_EPSILON, DEFAULT_WINDOW
from token_swarm.mixing.groups import make_groups
from token_swarm.mixing.native_unit import NativeByteUnit
from token_swarm.mixing.sampling import Sampler, Sampling
from token_swarm.mixing.trie import ByteTrie
from token_swarm.particle import Mixture, Rule

NEXT = 0.6
"""Probability of the text's own next token."""


class Scene:
    """A text, two vocabularies, and laws along the text's canonical tokens."""

    def __init__(self, models: dict[str, Path], text: str) -> None:
        self.text = text.encode()
        self.specs: dict[str, ExpertSpec] = {}
        self.laws: dict[str, dict[tuple[int, ...], ByteLaw]] = {}
        self.noise: dict[str, ByteLaw] = {}
        self.tries: dict[str, ByteTrie] = {}
        for name, path in models.items():
            tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
            eos = eos_ids_of(config, GenerationConfig.from_pretrained(path), tokenizer)
            vocabulary = vocabulary_of(tokenizer, width=config.vocab_size, eos_ids=eos)
            self.specs[name] = ExpertSpec(name, "none", vocabulary, name, 10**6, 8, torch.float32)
            trie = self.tries[vocabulary.fingerprint] = ByteTrie.build(vocabulary)
            maker = LawMaker(trie, vocabulary.eos_ids)
            noise = torch.randn(vocabulary.width, generator=torch.Generator().manual_seed(1)) * 4
            noise[~torch.from_numpy(vocabulary.allowed.copy())] = -torch.inf
            base = torch.softmax(noise, 0)
            self.noise[name] = maker(base)
            tokens = tokenizer.encode(text, add_special_tokens=False)
            self.laws[name] = {}
            for at, token in enumerate(tokens):
                law = base * (1 - NEXT)
                law[token] += NEXT
                self.laws[name][tuple(tokens[:at])] = maker(law)

    def unit(self, kind: type[ByteUnit], rule: Rule) -> ByteUnit:
        """A byte unit at the start of the text; the prompt is one token that is taken for granted."""
        groups = make_groups(self.specs, Mixture(dict.fromkeys(self.specs, 0.5), rule))
        prompts = {name: EncodedPrompt((0,), 0) for name in self.specs}
        return kind(groups, self.tries, prompts, Sampling(), epsilon=DEFAULT_EPSILON, window=DEFAULT_WINDOW)

    def feed(self, unit: ByteUnit) -> int:
        """Give every due head its law; returns the number of forwards that would have been."""
        count = 0
        while needs := unit.due():
            for need in needs:
                name = unit.groups[need.group].names[0]
                law = self.laws[name].get(need.tokens[1:], self.noise[name])
                unit.states[need.group].feed(need.key, law)
                count += 1
        return count


def walk_native(scene: Scene, rule: Rule, batch: int) -> tuple[float, int, int]:
    """(seconds in walks, bytes of one text, forwards of one text), `batch` texts in each call."""
    units = [scene.unit(NativeByteUnit, rule) for _ in range(batch)]
    assert all(isinstance(unit, NativeByteUnit) for unit in units)
    at, seconds, forwards = 0, 0.0, 0
    while at < len(scene.text):
        for unit in units:
            fed = scene.feed(unit)
        forwards += fed
        rest = scene.text[at:]
        arguments: dict[str, Any] = {
            "uniforms": [None] * batch,
            "scripts": [rest] * batch,
            "max_bytes": [len(rest)] * batch,
            "max_tokens": [0] * batch,
        }
        walks = [unit.walker for unit in units]  # type: ignore[attr-defined]
        started = time.perf_counter()
        stretches = walk_together(walks, **arguments)
        seconds += time.perf_counter() - started
        assert stretches[0].status in (Status.NEEDS_FORWARD, Status.LIMIT)
        at += len(stretches[0].data)
    return seconds, at, forwards


def walk_python(scene: Scene, rule: Rule) -> tuple[float, int]:
    """(seconds, bytes) of the Python byte unit."""
    unit, at, seconds = scene.unit(ByteUnit, rule), 0, 0.0
    sampler = Sampler(greedy=True, seed=0, script=scene.text)
    while at < len(scene.text):
        scene.feed(unit)
        started = time.perf_counter()
        at += len(unit.walk(sampler, max_bytes=len(scene.text) - at, max_tokens=None).data)
        seconds += time.perf_counter() - started
    return seconds, at


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".cache/experts"), help="folder of the two demo experts")
    parser.add_argument("--text-file", type=Path, default=Path("tests/data/prose.txt"))
    parser.add_argument("--bytes", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = options.text_file.read_text(encoding="utf-8").encode()[: options.bytes].decode(errors="ignore")
    scene = Scene({name: options.models / name for name in ("smollm2", "gemma3")}, text)
    rows = []
    for rule in Rule:
        figures: dict[str, list[float]] = {"batch 1": [], "batch 8": [], "Python": []}
        for _ in range(options.rounds):
            for batch in (1, 8):
                seconds, count, forwards = walk_native(scene, rule, batch)
                figures[f"batch {batch}"].append(1e6 * seconds / count / batch)
            seconds, count = walk_python(scene, rule)
            figures["Python"].append(1e6 * seconds / count)
        medians = {name: float(np.median(own)) for name, own in figures.items()}
        rows.append({"rule": rule.value, "bytes": count, "forwards": forwards, "us_per_byte": medians})
    table = Table("Microseconds per byte and text", ("rule", "bytes", *figures))
    for row in rows:
        table.rows.append((row["rule"], str(row["bytes"]), *(f"{us:.1f}" for us in row["us_per_byte"].values())))
    give("byte_walk", {"rows": rows}, [table], as_json=options.json)


if __name__ == "__main__":
    main()
