"""What a step of the transformers backend costs beside `model.generate` of the same model, in one run.

Rounds alternate between the two, because the clock and the neighbours of a machine drift; every figure is the
median over the rounds, every ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from token_swarm_server.benchmark.tables import Table
from transformers import AutoModelForCausalLM

from bench.common import give
from token_swarm.experts.contract import Close, Extend, Fork, Open, Rows
from token_swarm.experts.transformers.expert import TransformersExpert

PROMPT = "The history of the printing press begins in the fifteenth century, when a goldsmith from Mainz"
BATCH = 8


def measure(model: str, *, threads: int, rounds: int, tokens: int) -> dict[str, float]:
    """Milliseconds per token or step, and their ratios; `tokens` is the length of each timed stretch."""
    expert = TransformersExpert("bench", model, threads=threads)
    dtype = expert.spec.dtype
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    prompt = expert.encode(PROMPT).tokens
    words = expert.tokenize(PROMPT)
    timed: dict[str, Callable[[], float]] = {
        "generate": lambda: _generate(plain, prompt, tokens),
        "batch_1": lambda: _steps(expert, prompt, words, tokens, batch=1, chunk=1),
        "three_tokens": lambda: _steps(expert, prompt, words, tokens, batch=1, chunk=3),
        "batch_8": lambda: _steps(expert, prompt, words, tokens, batch=BATCH, chunk=1),
    }
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, run in timed.items():
            value = run()
            # The first round warms up.
            if number:
                samples[name].append(value)
    expert.close()
    figures = {f"{name}_ms": statistics.median(values) for name, values in samples.items()}
    figures["batch_1_over_generate"] = _ratio(samples["batch_1"], samples["generate"])
    figures["three_tokens_over_batch_1"] = _ratio(samples["three_tokens"], samples["batch_1"])
    figures["throughput_8_over_generate"] = BATCH * _ratio(samples["generate"], samples["batch_8"])
    return figures


def _generate(model: AutoModelForCausalLM, prompt: tuple[int, ...], tokens: int) -> float:
    """Milliseconds per token of greedy generation, the prompt's own forward taken off."""
    inputs = torch.tensor([prompt])
    mask = torch.ones_like(inputs)

    def run(count: int) -> float:
        start = time.perf_counter()
        model.generate(
            inputs, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count
        )
        return time.perf_counter() - start

    first = run(1)
    return (run(tokens + 1) - first) / tokens * 1e3


def _steps(
    expert: TransformersExpert,
    prompt: tuple[int, ...],
    words: tuple[int, ...],
    steps: int,
    *,
    batch: int,
    chunk: int,
) -> float:
    """Median milliseconds of a step that gives each of `batch` sequences `chunk` tokens."""
    expert.step([Open(0, prompt, Rows.NONE), *(Fork(0, number) for number in range(1, batch))])
    times = []
    for number in range(steps):
        new = tuple(words[(number + index) % len(words)] for index in range(chunk))
        ops = [Extend(sequence, new) for sequence in range(batch)]
        start = time.perf_counter()
        expert.step(ops)
        times.append(time.perf_counter() - start)
    expert.step([Close(sequence) for sequence in range(batch)])
    return statistics.median(times) * 1e3


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    """Print the comparison, as a table or as JSON."""
    parser = argparse.ArgumentParser(prog="bench.expert_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="directory or hub id of a causal language model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first, which warms up")
    parser.add_argument("--tokens", type=int, default=24, help="tokens or steps of each timed stretch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures = measure(options.model, threads=options.threads, rounds=options.rounds, tokens=options.tokens)
    table = Table("A step of the transformers expert and of plain transformers", ("what", "ms, or a ratio"))
    table.rows += [(name, f"{value:.2f}") for name, value in figures.items()]
    given = {"model": options.model, "threads": options.threads, "figures": figures}
    give("expert_step", given, [table], as_json=options.json)


if __name__ == "__main__":
    main()
