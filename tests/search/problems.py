"""Likelihood problems with a known kind of optimum, made from random laws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from token_swarm.particle import Rule
from token_swarm.search.optimisers.base import Best, Optimiser
from token_swarm.search.optimisers.space import Space
from token_swarm.search.utility import Array


@dataclass(frozen=True)
class Problem:
    """log_probs: float32 [positions, experts, symbols]; targets: [positions], drawn from a law all experts guess at."""

    log_probs: np.ndarray
    targets: np.ndarray

    @property
    def masses(self) -> Array:
        """[experts, positions]."""
        return np.exp(self.log_probs[np.arange(len(self.targets)), :, self.targets].T.astype(np.float64))

    def space(self, rule: Rule) -> Space:
        return Space(tuple(f"e{i}" for i in range(self.log_probs.shape[1])), rule)

    def utility(self, rule: Rule, positions: Array) -> Array:
        """Nats per position of every row, by the definition."""
        if rule is Rule.LINEAR:
            return np.log(positions @ self.masses).mean(axis=1)
        logs = self.log_probs.astype(np.float64)
        values = []
        for weights in positions:
            joint = np.tensordot(logs, weights, axes=([1], [0]))
            joint[~np.isfinite(logs).all(axis=1)] = -np.inf
            norm = np.log(np.exp(joint - joint.max(axis=1, keepdims=True)).sum(axis=1)) + joint.max(axis=1)
            values.append((joint[np.arange(len(self.targets)), self.targets] - norm).mean())
        return np.array(values)

    def best_single(self, rule: Rule) -> float:
        return float(self.utility(rule, self.space(rule).one_hot()).max())


def make_problem(experts: int, positions: int, seed: int, symbols: int = 257) -> Problem:
    """Experts see the true logits through noise, the first one most clearly, and are over- or underconfident."""
    random = np.random.default_rng(seed)
    truth = 3 * random.standard_normal((positions, 1, symbols))
    skill = np.linspace(0.9, 0.2, experts)[None, :, None]
    noise = 3 * random.standard_normal((positions, experts, symbols))
    logits = (truth * skill + noise * np.sqrt(1 - skill**2)) * random.uniform(0.8, 1.6, (1, experts, 1))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    law = np.exp(truth[:, 0]) / np.exp(truth[:, 0]).sum(-1, keepdims=True)
    targets = (law.cumsum(-1) > random.random((positions, 1))).argmax(-1)
    return Problem(log_probs.astype(np.float32), targets)


def climb(optimiser: Optimiser, judge, limit: int = 2000) -> Best:
    """Run a search to its end; returns the best."""
    for _ in range(limit):
        if optimiser.done:
            assert optimiser.best is not None
            return optimiser.best
        positions = optimiser.ask()
        optimiser.tell(positions, judge(positions))
    raise AssertionError(f"{optimiser.name} does not end")
