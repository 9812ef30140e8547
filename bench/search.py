"""How near each optimiser comes to the optimum, and what it costs: `python -m bench.search --help`.

Problems are likelihoods, of random experts and of score caches; the optimum is that of EM or L-BFGS. A gap is measured
in float64, whatever precision the search was told its utilities in.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.common import print_facts, print_json
from token_swarm import kernels
from token_swarm.kernels import reference
from token_swarm.particle import Rule
from token_swarm.search.data import TextExample, load_jsonl
from token_swarm.search.optimisers.registry import OPTIMISERS, make_optimiser
from token_swarm.search.optimisers.space import Space
from token_swarm.search.report.oracles import Optimum, certificate_linear, em_linear, lbfgs_log_linear
from token_swarm.search.score_cache.cache import ExpertKey, ScoreCache, passages_hash
from token_swarm.search.utilities.likelihood import LogLikelihood
from token_swarm.search.utility import Array


@dataclass(frozen=True)
class Problem:
    """log_probs: float32 [positions, experts, symbols]; targets: int64 [positions]."""

    name: str
    rule: Rule
    experts: tuple[str, ...]
    log_probs: torch.Tensor
    targets: torch.Tensor
    masses: torch.Tensor  # float64 [experts, positions]

    def optimum(self) -> Optimum:
        """By the oracle of the rule."""
        if self.rule is Rule.LINEAR:
            return em_linear(self.masses.numpy())
        return lbfgs_log_linear(self.log_probs.numpy(), self.targets.numpy())

    def utility(self, weights: Array, with_kernels: bool = True) -> Array:
        """Nats per position of every row of `weights`."""
        score, rows = kernels if with_kernels else reference, torch.from_numpy(weights)
        offsets = torch.tensor([0, len(self.targets)])
        if self.rule is Rule.LINEAR:
            total = score.score_linear(self.masses, rows, offsets)
        else:
            total = score.score_log_linear(self.log_probs, self.targets, rows, offsets)
        return np.asarray(total[:, 0].numpy() / len(self.targets))


def synthetic(experts: int, positions: int, rule: Rule, symbols: int = 257) -> Problem:
    """Experts that see the true logits through noise, the first one most clearly, over- or underconfident."""
    random = np.random.default_rng(experts)
    truth = 3 * random.standard_normal((positions, 1, symbols), dtype=np.float32)
    skill = np.linspace(0.9, 0.2, experts, dtype=np.float32)[None, :, None]
    noise = 3 * random.standard_normal((positions, experts, symbols), dtype=np.float32)
    confidence = random.uniform(0.8, 1.6, (1, experts, 1)).astype(np.float32)
    logits = torch.from_numpy((truth * skill + noise * np.sqrt(1 - skill**2)) * confidence)
    laws = torch.softmax(torch.from_numpy(truth[:, 0]).double(), dim=-1).cumsum(-1)
    targets = (laws > torch.from_numpy(random.random((positions, 1)))).int().argmax(-1)
    names = tuple(f"e{i}" for i in range(experts))
    return _problem(f"synthetic, {experts} experts", rule, names, logits.log_softmax(-1), targets)


def from_cache(root: Path, data: Path, rule: Rule) -> Problem:
    """A likelihood of every expert that has read the examples of `data`."""
    passages = LogLikelihood.passages(load_jsonl(data, TextExample).examples)
    found = sorted((root / passages_hash(passages)[:16]).glob("*/expert.json"))
    keys = [ExpertKey(**json.loads(path.read_text(encoding="utf-8"))) for path in found]
    cache = ScoreCache(root, keys, passages)
    return Problem(data.stem, rule, cache.experts, cache.log_probs(), cache.targets(), cache.masses())


def _problem(
    name: str, rule: Rule, experts: tuple[str, ...], log_probs: torch.Tensor, targets: torch.Tensor
) -> Problem:
    masses = log_probs[torch.arange(len(targets)), :, targets].T.double().exp()
    return Problem(name, rule, experts, log_probs, targets, masses)


def search(problem: Problem, name: str, seed: int) -> dict[str, float]:
    """One search: what it found, how often it asked and how long it took."""
    started = time.perf_counter()
    optimiser = make_optimiser(name, Space(problem.experts, problem.rule), {}, smooth=True, seed=seed)
    evaluations = 0
    while not optimiser.done:
        positions = optimiser.ask()
        optimiser.tell(positions, problem.utility(positions))
        evaluations += len(positions)
    seconds = time.perf_counter() - started
    assert optimiser.best is not None
    utility = float(problem.utility(optimiser.best.position[None], with_kernels=False)[0])
    row = {"utility": utility, "evaluations": evaluations, "seconds": seconds}
    if problem.rule is Rule.LINEAR:
        row["certificate"] = certificate_linear(problem.masses.numpy(), optimiser.best.position)
    return row


def compare(problem: Problem, names: Sequence[str], seeds: int) -> Iterator[dict[str, object]]:
    """One row an optimiser, and first the oracle's."""
    started = time.perf_counter()
    optimum = problem.optimum()
    base = {"problem": problem.name, "rule": problem.rule.value, "positions": len(problem.targets)}
    weights = dict(zip(problem.experts, optimum.weights.tolist(), strict=True))
    singles = problem.utility(np.eye(len(problem.experts)), with_kernels=False)
    yield {
        **base,
        "optimiser": "oracle",
        "utility": optimum.utility,
        "certificate": optimum.certificate,
        "evaluations": optimum.iterations,
        "seconds": time.perf_counter() - started,
        "weights": weights,
        "experts": dict(zip(problem.experts, singles.tolist(), strict=True)),
    }
    for name in names:
        runs = [search(problem, name, seed) for seed in range(seeds)]
        gaps = [optimum.utility - run["utility"] for run in runs]
        row: dict[str, object] = {
            **base,
            "optimiser": name,
            "median_gap": median(gaps),
            "worst_gap": max(gaps),
            "evaluations": median(run["evaluations"] for run in runs),
            "seconds": median(run["seconds"] for run in runs),
        }
        if problem.rule is Rule.LINEAR:
            # A run is inside its certificate when the oracle is not better than that says.
            inside = [gap <= run["certificate"] + 1e-13 for gap, run in zip(gaps, runs, strict=True)]
            row |= {"inside": f"{sum(inside)}/{seeds}", "worst_certificate": max(run["certificate"] for run in runs)}
        yield row


def regenerate(paths: dict[str, str], cache: Path, data: Path, examples: int, evaluations: int) -> dict[str, object]:
    """The same search without a cache: every particle reads the data with the models.

    Timed on a few examples, and stretched to `evaluations` particles on all of them; beside it, the cached kernel.
    """
    from token_swarm.decoding.in_process import LocalEnsemble
    from token_swarm.experts.transformers.expert import TransformersExpert

    local = LocalEnsemble({name: TransformersExpert(name, path, threads=1) for name, path in paths.items()})
    whole = load_jsonl(data, TextExample).examples
    mixture = local.ensemble.uniform(Rule.LOG_LINEAR)
    local.score(whole[0].prompt, whole[0].text, mixture)  # fills caches, compiles
    started, timed = time.perf_counter(), whole[:examples]
    for each in timed:
        local.score(each.prompt, each.text, mixture)
    per_byte = (time.perf_counter() - started) / sum(len(each.text.encode()) for each in timed)
    problem = from_cache(cache, data, Rule.LOG_LINEAR)
    positions = np.full((20, len(problem.experts)), 0.5)
    started = time.perf_counter()
    problem.utility(positions)
    cached = (time.perf_counter() - started) / len(positions)
    total = sum(len(each.text.encode()) for each in whole)
    return {
        "data": data.stem,
        "examples_timed": len(timed),
        "bytes": total,
        "regenerated_seconds_per_particle": per_byte * total,
        "cached_seconds_per_particle": cached,
        "regenerated_hours": per_byte * total * evaluations / 3600,
        "cached_seconds": cached * evaluations,
        "ratio": per_byte * total / cached,
    }


def show(row: dict[str, object]) -> None:
    """A line for people."""
    head = f"{row['problem']!s:24} {row['rule']!s:10} {row['positions']:>7,} {row['optimiser']!s:22}"
    if row["optimiser"] == "oracle":
        text = f"{row['utility']:.6f} nats per byte, certificate {row['certificate']:.1e}, "
        text += f"{row['evaluations']} iterations, {row['seconds']:.2f} s"
    else:
        text = f"gap median {row['median_gap']:9.1e} worst {row['worst_gap']:9.1e}  "
        text += f"{row['evaluations']:6.0f} evaluations  {row['seconds']:7.2f} s"
        text += f"  inside its certificate {row['inside']}" if "inside" in row else ""
    print(head, text, flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--optimiser", nargs="+", choices=OPTIMISERS, default=OPTIMISERS)
    parser.add_argument(
        "--rule", nargs="+", choices=[rule.value for rule in Rule], default=[rule.value for rule in Rule]
    )
    parser.add_argument("--positions", type=int, default=20_000, help="of the linear synthetic problems")
    parser.add_argument("--log-linear-positions", type=int, default=2_000)
    parser.add_argument("--experts", type=int, nargs="*", default=[2, 6], help="sizes of the synthetic problems")
    parser.add_argument("--cache", type=Path, default=Path(".cache/scores"), help="of the --data")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="JSONL of texts that the cache holds")
    parser.add_argument("--regenerate", type=int, default=0, metavar="N", help="time N examples without the cache")
    parser.add_argument("--expert", nargs="*", default=[], metavar="NAME=DIRECTORY", help="of --regenerate")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.regenerate:
        paths = dict(pair.split("=", 1) for pair in options.expert)
        runs = [regenerate(paths, options.cache, path, options.regenerate, 1000) for path in options.data]
        print_json("search", {"regenerated": runs})
        return
    rows = []
    if not options.json:
        print_facts()
    for problem in problems(options):
        for row in compare(problem, options.optimiser, options.seeds):
            rows.append(row)
            if not options.json:
                show(row)
    if options.json:
        print_json("search", {"rows": rows})


def problems(options: argparse.Namespace) -> Iterator[Problem]:
    """What was asked for, one in memory at a time."""
    for rule in map(Rule, options.rule):
        for size in options.experts:
            yield synthetic(size, options.positions if rule is Rule.LINEAR else options.log_linear_positions, rule)
        for path in options.data:
            yield from_cache(options.cache, path, rule)


if __name__ == "__main__":
    main()
