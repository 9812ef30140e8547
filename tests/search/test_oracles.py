"""The oracles against brute force: what they call the optimum is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.search.problems import make_problem
from token_swarm.errors import BadParameter
from token_swarm.kernels import reference as kernels
from token_swarm.particle import Rule
from token_swarm.search.report.oracles import certificate_linear, em_linear, lbfgs_log_linear


@pytest.mark.parametrize("rule", list(Rule))
def test_the_problems_are_scored_as_the_kernels_score(rule: Rule) -> None:
    problem = make_problem(3, 50, seed=1, symbols=9)
    positions = np.random.default_rng(0).random((4, 3))
    weights, offsets = torch.from_numpy(positions), torch.tensor([0, 50])
    if rule is Rule.LINEAR:
        scores = kernels.score_linear(torch.from_numpy(problem.masses), weights, offsets)
    else:
        tables = torch.from_numpy(problem.log_probs), torch.from_numpy(problem.targets)
        scores = kernels.score_log_linear(*tables, weights, offsets)
    np.testing.assert_allclose(problem.utility(rule, positions) * 50, scores[:, 0], rtol=1e-9)


def test_em_is_the_top_of_a_dense_grid() -> None:
    problem = make_problem(2, 400, seed=3)
    optimum = em_linear(problem.masses)
    first = np.linspace(0, 1, 10_001)
    grid = problem.utility(Rule.LINEAR, np.stack([first, 1 - first], axis=1))
    assert 0 <= optimum.utility - grid.max() < 1e-7
    assert abs(optimum.weights[0] - first[grid.argmax()]) <= 1e-4


def test_the_certificate_bounds_what_is_left_anywhere() -> None:
    problem = make_problem(5, 400, seed=4)
    optimum = em_linear(problem.masses)
    for weights in np.random.default_rng(0).dirichlet(np.ones(5), 200):
        left = optimum.utility - problem.utility(Rule.LINEAR, weights[None])[0]
        assert left <= certificate_linear(problem.masses, weights) + 1e-12


def test_em_gives_a_useless_expert_nothing() -> None:
    masses = np.array([[0.5, 0.4, 0.6], [0.4, 0.3, 0.5]])
    optimum = em_linear(masses)
    assert optimum.weights[1] < 1e-8
    assert optimum.utility == pytest.approx(np.log(masses[0]).mean(), abs=1e-9)


@pytest.mark.parametrize(
    ("masses", "says"),
    [
        ([[0.5, 0.0], [0.5, 0.0]], "at least one expert at every position"),
        ([[0.5, np.nan]], "finite"),
        ([[0.5, -0.1]], ">= 0"),
        ([0.5, 0.1], "experts, positions"),
    ],
)
def test_em_refuses_what_is_no_likelihood(masses, says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        em_linear(np.array(masses))


def test_lbfgs_is_a_top() -> None:
    """Every step away from it goes down."""
    problem = make_problem(3, 300, seed=5, symbols=33)
    optimum = lbfgs_log_linear(problem.log_probs, problem.targets)
    assert optimum.utility == pytest.approx(
        problem.utility(Rule.LOG_LINEAR, optimum.weights[None])[0], rel=0, abs=1e-12
    )
    random = np.random.default_rng(1)
    for size in (1e-3, 1e-1, 1.0):
        around = optimum.weights + size * random.standard_normal((20, 3))
        assert (problem.utility(Rule.LOG_LINEAR, around) < optimum.utility).all()
    assert 0 <= optimum.certificate < 1e-12


def test_lbfgs_skips_symbols_that_an_expert_excludes() -> None:
    problem = make_problem(2, 60, seed=6, symbols=8)
    other = (problem.targets + 1) % 8
    problem.log_probs[np.arange(60), 0, other] = -np.inf
    optimum = lbfgs_log_linear(problem.log_probs, problem.targets)
    assert optimum.utility == pytest.approx(
        problem.utility(Rule.LOG_LINEAR, optimum.weights[None])[0], rel=0, abs=1e-12
    )


def test_lbfgs_names_the_expert_that_excludes_the_text() -> None:
    problem = make_problem(2, 10, seed=6, symbols=8)
    problem.log_probs[3, 1, problem.targets[3]] = -np.inf
    with pytest.raises(BadParameter, match="expert 1"):
        lbfgs_log_linear(problem.log_probs, problem.targets)
