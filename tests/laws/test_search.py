"""Law 10: the swarm is at most EM's optimum plus its certificate, and at least the best single expert."""

from __future__ import annotations

import pytest

from tests.search.problems import Problem, climb, make_problem
from token_swarm.particle import Rule
from token_swarm.search.optimisers.registry import OPTIMISERS, make_optimiser
from token_swarm.search.report.oracles import certificate_linear, em_linear, lbfgs_log_linear

LINEAR = {experts: make_problem(experts, 1500, seed=experts) for experts in (2, 6)}
LOG_LINEAR = {2: make_problem(2, 300, seed=7, symbols=33), 4: make_problem(4, 200, seed=8, symbols=33)}


def learned(problem: Problem, rule: Rule, name: str, seed: int):
    # The single experts are part of every start of the swarms; the others have to find at least as good ones.
    optimiser = make_optimiser(name, problem.space(rule), {}, smooth=True, seed=seed)
    return climb(optimiser, lambda positions: problem.utility(rule, positions))


@pytest.mark.parametrize("experts", LINEAR)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_linear_search_stays_inside_the_certificate(name: str, experts: int) -> None:
    problem = LINEAR[experts]
    optimum = em_linear(problem.masses)
    assert optimum.certificate <= 1e-9
    best = learned(problem, Rule.LINEAR, name, seed=1)
    assert best.utility <= optimum.utility + optimum.certificate + 1e-13
    # And the other way round: the particle's own certificate bounds what the oracle does better.
    assert optimum.utility <= best.utility + certificate_linear(problem.masses, best.position) + 1e-13
    if name != "random":
        assert best.utility >= problem.best_single(Rule.LINEAR)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("experts", LINEAR)
def test_the_default_swarm_reaches_the_linear_optimum(experts: int, seed: int) -> None:
    problem = LINEAR[experts]
    best = learned(problem, Rule.LINEAR, "swarm", seed)
    assert best.utility == pytest.approx(em_linear(problem.masses).utility, rel=0, abs=1e-9)


@pytest.mark.parametrize("experts", LOG_LINEAR)
def test_the_default_swarm_reaches_the_log_linear_optimum(experts: int) -> None:
    problem = LOG_LINEAR[experts]
    optimum = lbfgs_log_linear(problem.log_probs, problem.targets)
    best = learned(problem, Rule.LOG_LINEAR, "swarm", seed=0)
    assert best.utility == pytest.approx(optimum.utility, rel=0, abs=1e-9)
    assert best.utility > problem.best_single(Rule.LOG_LINEAR)


def test_the_faithful_swarm_beats_the_best_single_expert() -> None:
    for experts, problem in LINEAR.items():
        best = learned(problem, Rule.LINEAR, "model-swarms", seed=0)
        assert best.utility > problem.best_single(Rule.LINEAR), experts
