"""Model Swarms, term by term: against a plain loop, and every rule of its schedule."""

from __future__ import annotations

import numpy as np
import pytest

from tests.search.problems import climb, make_problem
from token_swarm.errors import BadParameter
from token_swarm.particle import Rule
from token_swarm.search.optimisers.model_swarms import ModelSwarms, ModelSwarmsSettings
from token_swarm.search.optimisers.space import Space

FREE = Space(("a", "b", "c"))
PROBLEM = make_problem(3, 200, seed=2)


def hill(positions):
    return -((positions - [0.6, 0.1, 0.4]) ** 2).sum(axis=1)


def stale(positions):
    """Every later position is worse than every earlier one."""
    stale.calls += 1
    return np.full(len(positions), -float(stale.calls))


@pytest.fixture(autouse=True)
def _fresh_staleness() -> None:
    stale.calls = 0


def test_defaults_are_the_papers() -> None:
    given = ModelSwarmsSettings()
    assert (given.inertia, given.cognitive, given.social, given.repel) == (0.4, 0.3, 0.3, 0.3)
    assert (given.step, given.step_decay, given.min_step) == (1.0, 0.95, 0.1)
    assert (given.patience, given.restart, given.iterations, given.particles) == (10, 5, 50, 20)


def test_the_swarm_starts_as_experts_and_crossovers_heading_for_one_another() -> None:
    swarm = ModelSwarms(FREE, seed=3)
    start = swarm.ask()
    assert start[:3].tolist() == np.eye(3).tolist()
    assert ((start[3:] > 0).sum(axis=1) == 2).all()
    np.testing.assert_allclose(start.sum(axis=1), 1)
    for i, velocity in enumerate(swarm.v):
        reached = np.flatnonzero(np.abs(start - (start[i] + velocity)).max(axis=1) < 1e-15)
        assert len(reached) >= 1
        assert i not in reached


def test_every_move_is_the_papers_formula() -> None:
    swarm = ModelSwarms(FREE, seed=5)
    given = swarm.settings
    personal = [(-np.inf, None)] * 20
    best, worst = (-np.inf, None), (np.inf, None)
    step = 1.0
    since = [0] * 20
    for _ in range(12):
        x, v = swarm.ask(), swarm.v.copy()
        utilities = hill(x)
        for i in range(20):
            if utilities[i] > personal[i][0]:
                personal[i], since[i] = (utilities[i], x[i]), 0
            else:
                since[i] += 1
            if utilities[i] < worst[0]:
                worst = (utilities[i], x[i])
        best = max([best, *personal], key=lambda pair: pair[0])
        draws = np.random.default_rng(0)
        draws.bit_generator.state = swarm.state()["random"]
        swarm.tell(x, utilities)
        if swarm.done:
            break
        r = 1 - draws.random((20, 4))
        for i in range(20):
            here, speed = (personal[i][1], np.zeros(3)) if since[i] >= given.restart else (x[i], v[i])
            c = r[i, 0] * 0.4 + r[i, 1] * 0.3 + r[i, 2] * 0.3 + r[i, 3] * 0.3
            speed = (
                r[i, 0] * 0.4 * speed
                + r[i, 1] * 0.3 * (personal[i][1] - here)
                + r[i, 2] * 0.3 * (best[1] - here)
                - r[i, 3] * 0.3 * (worst[1] - here)
            ) / c
            np.testing.assert_allclose(swarm.v[i], speed, rtol=0, atol=1e-14)
            np.testing.assert_allclose(swarm.x[i], here + step * speed, rtol=0, atol=1e-14)
        step = max(0.95 * step, 0.1)


def test_a_scalar_per_particle_keeps_the_sum_of_the_weights() -> None:
    swarm = ModelSwarms(FREE, seed=0)
    for _ in range(30):
        if swarm.done:
            break
        np.testing.assert_allclose(swarm.ask().sum(axis=1), 1, atol=1e-12)
        swarm.tell(swarm.ask(), hill(swarm.ask()))


def test_linear_particles_stay_on_the_simplex() -> None:
    swarm = ModelSwarms(PROBLEM.space(Rule.LINEAR), seed=0)
    hit = False
    while not swarm.done:
        x = swarm.ask()
        assert (x >= 0).all()
        np.testing.assert_allclose(x.sum(axis=1), 1, atol=1e-12)
        hit = hit or bool((x[3:] == 0).any(axis=1).sum() > 0)
        swarm.tell(x, PROBLEM.utility(Rule.LINEAR, x))
    assert hit


def test_patience_ends_a_search_that_finds_nothing_better() -> None:
    swarm = ModelSwarms(FREE, ModelSwarmsSettings(patience=4), seed=0)
    batches = 0
    while not swarm.done:
        swarm.tell(swarm.ask(), stale(swarm.ask()))
        batches += 1
    assert batches == 1 + 4


def test_iterations_bound_a_search_that_always_improves() -> None:
    swarm = ModelSwarms(FREE, ModelSwarmsSettings(iterations=7), seed=0)
    batches = 0
    while not swarm.done:
        batches += 1
        swarm.tell(swarm.ask(), np.full(20, float(batches)))
    assert batches == 7


def test_a_stray_particle_goes_back_to_its_best_without_velocity() -> None:
    settings = ModelSwarmsSettings(cognitive=0.0, social=0.0, repel=0.0, inertia=1.0, restart=3, patience=9)
    swarm = ModelSwarms(FREE, settings, seed=0)
    start = swarm.ask()
    for _ in range(3):
        swarm.tell(swarm.ask(), stale(swarm.ask()))
        assert np.abs(swarm.ask() - start).max(axis=1).min() > 0
    swarm.tell(swarm.ask(), stale(swarm.ask()))
    np.testing.assert_array_equal(swarm.ask(), start)


def test_the_worst_of_all_times_repels() -> None:
    settings = ModelSwarmsSettings(cognitive=0.0, social=0.0, inertia=0.0)
    swarm = ModelSwarms(FREE, settings, seed=0)
    x = swarm.ask()
    utilities = hill(x)
    worst = x[utilities.argmin()]
    swarm.tell(x, utilities)
    np.testing.assert_allclose(swarm.ask(), x + (x - worst), atol=1e-14)


def test_the_step_decays_to_its_floor() -> None:
    swarm = ModelSwarms(FREE, ModelSwarmsSettings(iterations=60), seed=0)
    for i in range(60):
        assert swarm.state()["_step"] == pytest.approx(max(0.95**i, 0.1))
        swarm.tell(swarm.ask(), np.full(20, float(i)))


def test_dropout_n_skips_single_particles_which_keep_their_utility() -> None:
    swarm = ModelSwarms(FREE, ModelSwarmsSettings(dropout_n=0.5, iterations=40), seed=0)
    sizes = []
    while not swarm.done:
        x = swarm.ask()
        sizes.append(len(x))
        swarm.tell(x, hill(x))
    assert sizes[0] == 20
    assert 7 < np.mean(sizes[1:]) < 13


def test_dropout_k_skips_whole_iterations() -> None:
    batches = {}
    for dropout in (0.0, 0.5):
        swarm = ModelSwarms(FREE, ModelSwarmsSettings(dropout_k=dropout, patience=200, iterations=60), seed=1)
        batches[dropout] = 0
        while not swarm.done:
            swarm.tell(swarm.ask(), hill(swarm.ask()))
            batches[dropout] += 1
        assert swarm.iteration == 60
    assert batches[0.0] == 60
    assert 20 < batches[0.5] < 42


def test_it_climbs() -> None:
    best = climb(ModelSwarms(FREE, seed=0), hill)
    assert best.utility > hill(np.eye(3)).max()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"particles": 0}, "particles"),
        ({"iterations": 1.5}, "iterations"),
        ({"dropout_k": 1.0}, "dropout_k"),
        ({"dropout_n": -0.1}, "dropout_n"),
        ({"step_decay": 1.5}, "step_decay"),
        ({"repel": np.nan}, "repel"),
        ({"inertia": 0.0, "cognitive": 0.0, "social": 0.0, "repel": 0.0}, "inertia"),
    ],
)
def test_senseless_settings_are_refused_by_name(settings, field: str) -> None:
    with pytest.raises(BadParameter) as refusal:
        ModelSwarmsSettings(**settings)
    assert refusal.value.field == field


def test_fewer_particles_than_experts_are_refused() -> None:
    with pytest.raises(BadParameter, match="particles"):
        ModelSwarms(FREE, ModelSwarmsSettings(particles=2))
