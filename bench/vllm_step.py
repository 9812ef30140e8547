"""What a step of the vLLM backend costs beside plain decoding in the same engine: `make vllm`, then with its Python
`python -m bench.vllm_step --model DIRECTORY`.

Plain decoding is vLLM's own loop: requests that sample token after token, without sessions and without logits for us.
Rounds alternate between the two, because the clock and the neighbours of a machine drift; every figure is the median
over the rounds, every ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from token_swarm_server.benchmark.tables import Table

from bench.common import give
from token_swarm.experts.contract import Close, Extend, Fork, Open, Rows
from token_swarm.experts.vllm.expert import VllmExpert
from token_swarm.experts.vllm.options import check_options, parse_options

PROMPT = "The history of the printing press begins in the fifteenth century, when a goldsmith from Mainz"
BATCH = 8


def measure(expert: VllmExpert, *, rounds: int, tokens: int) -> dict[str, float]:
    """Milliseconds per step, and their ratios; `tokens` is the length of each timed stretch."""
    prompt = expert.encode(PROMPT).tokens
    words = expert.tokenize(PROMPT)
    timed: dict[str, Callable[[], float]] = {
        "plain_1": lambda: _plain(expert, prompt, tokens, batch=1),
        "batch_1": lambda: _steps(expert, prompt, words, tokens, batch=1, chunk=1, rows=Rows.LAST),
        "three_tokens": lambda: _steps(expert, prompt, words, tokens, batch=1, chunk=3, rows=Rows.ALL),
        "plain_8": lambda: _plain(expert, prompt, tokens, batch=BATCH),
        "batch_8": lambda: _steps(expert, prompt, words, tokens, batch=BATCH, chunk=1, rows=Rows.LAST),
    }
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, run in timed.items():
            value = run()
            # The first round warms up.
            if number:
                samples[name].append(value)
    figures = {f"{name}_ms": statistics.median(values) for name, values in samples.items()}
    figures["batch_1_over_plain"] = _ratio(samples["batch_1"], samples["plain_1"])
    figures["three_tokens_over_plain"] = _ratio(samples["three_tokens"], samples["plain_1"])
    figures["batch_8_over_plain"] = _ratio(samples["batch_8"], samples["plain_8"])
    return figures


def _plain(expert: VllmExpert, prompt: tuple[int, ...], steps: int, *, batch: int) -> float:
    """Median milliseconds of a step of vLLM that decodes `batch` requests."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    engine = expert._engine
    core = engine._core
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)
    params.extra_args = engine.no_rows()
    for _ in range(batch):
        core.add_request(Request(engine.new_request(), list(prompt), params, None))
    core.step()  # the prompts
    times = []
    while core.scheduler.get_num_unfinished_requests():
        start = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _steps(
    expert: VllmExpert,
    prompt: tuple[int, ...],
    words: tuple[int, ...],
    steps: int,
    *,
    batch: int,
    chunk: int,
    rows: Rows,
) -> float:
    """Median milliseconds of a step that gives each of `batch` sequences `chunk` tokens and returns logit rows."""
    expert.step([Open(0, prompt, Rows.NONE), *(Fork(0, number) for number in range(1, batch))])
    expert.step([Extend(sequence, words[:1]) for sequence in range(batch)])  # forks have no KV before
    times = []
    for number in range(steps):
        new = tuple(words[(number + index) % len(words)] for index in range(chunk))
        ops = [Extend(sequence, new, rows) for sequence in range(batch)]
        start = time.perf_counter()
        expert.step(ops)
        times.append(time.perf_counter() - start)
    expert.step([Close(sequence) for sequence in range(batch)])
    return statistics.median(times) * 1e3


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    """Print the comparison, as a table or as JSON."""
    parser = argparse.ArgumentParser(prog="bench.vllm_step", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", required=True, help="directory or hub id of a causal language model")
    parser.add_argument("--dtype", default="auto", help="as in an expert's configuration (default: auto)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first, which warms up")
    parser.add_argument("--tokens", type=int, default=24, help="steps of each timed stretch")
    parser.add_argument("--engine", action="append", default=[], metavar="KEY=VALUE", help="engine argument")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    engine = parse_options(options.engine)
    check_options(engine)
    expert = VllmExpert(
        "bench",
        options.model,
        dtype=options.dtype,
        threads=options.threads,
        max_sequences=BATCH,
        max_context=512,
        engine=engine,
    )
    try:
        figures = measure(expert, rounds=options.rounds, tokens=options.tokens)
    finally:
        expert.close()
    table = Table("A step of the vLLM expert and of plain vLLM", ("what", "ms, or a ratio"))
    table.rows += [(name, f"{value:.2f}") for name, value in figures.items()]
    given = {"model": options.model, "threads": options.threads, "engine": engine, "figures": figures}
    give("vllm_step", given, [table], as_json=options.json)


if __name__ == "__main__":
    main()
