"""What every optimiser keeps: the contract of ask and tell, seeds, failures, resuming to the bit."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from tests.search.problems import climb, make_problem
from token_swarm.errors import BadParameter
from token_swarm.particle import Rule
from token_swarm.search.optimisers.base import Best
from token_swarm.search.optimisers.particle_swarm import ParticleSwarm, SwarmSettings
from token_swarm.search.optimisers.polish import Polish
from token_swarm.search.optimisers.registry import OPTIMISERS, make_optimiser
from token_swarm.search.optimisers.space import Space

PROBLEM = make_problem(3, 150, seed=1, symbols=32)
SMALL = {"particles": 8, "iterations": 12}
SPACES = {
    "linear": Space(("e0", "e1", "e2"), Rule.LINEAR),
    "log-linear": Space(("e0", "e1", "e2")),
    "temperatures": Space(("e0", "e1", "e2"), Rule.LINEAR, temperatures=True),
}


def judge(space: Space, positions):
    """A likelihood, or a hill over free weights; minus a parabola around temperatures of 1.5."""
    weights, logs = positions[:, :3], positions[:, 3:]
    if space.on_simplex:
        value = np.log(weights @ PROBLEM.masses).mean(axis=1)
    else:
        value = -np.log(np.cosh((weights - [0.7, -0.2, 0.4]) @ [[1, 0.2, 0], [0, 0.6, 0], [0, 0.3, 1.5]])).sum(axis=1)
    return value - 0.01 * ((logs - np.log(1.5)) ** 2).sum(axis=1)


def trace(optimiser, space: Space, batches: int):
    """The positions of the next `batches` batches."""
    seen = []
    for _ in range(batches):
        if optimiser.done:
            break
        positions = optimiser.ask()
        seen.append(positions)
        optimiser.tell(positions, judge(space, positions))
    return seen


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_a_resumed_search_is_the_same_to_the_bit(name: str, space: Space) -> None:
    def make():
        return make_optimiser(name, space, SMALL, smooth=True, seed=4)

    whole = make()
    seen = trace(whole, space, 500)
    assert whole.done
    again = make()
    for stop in (0, 1, 5, len(seen) - 1):
        if stop > len(seen):
            continue
        first, second = make(), make()
        trace(first, space, stop)
        state = first.state()
        trace(first, space, 3)  # what happens after the checkpoint does not change it
        second.restore(state)
        rest = trace(second, space, 500)
        assert len(rest) == len(seen) - stop
        assert all(np.array_equal(a, b) for a, b in zip(rest, seen[stop:], strict=True))
        assert second.best is not None
        assert np.array_equal(second.best.position, whole.best.position)
        assert second.best.utility == whole.best.utility
    assert all(np.array_equal(a, b) for a, b in zip(trace(again, space, 500), seen, strict=True))


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_what_is_asked_lies_in_the_space(name: str, space: Space) -> None:
    optimiser = make_optimiser(name, space, SMALL, smooth=True, seed=0)
    for positions in trace(optimiser, space, 500):
        np.testing.assert_allclose(space.project(positions), positions, rtol=0, atol=1e-12)
        space.mixtures(positions)
    best = optimiser.best
    assert best.utility == pytest.approx(judge(space, best.position[None])[0], abs=1e-12)
    assert optimiser.population.shape[1] == space.dimension


@pytest.mark.parametrize("name", OPTIMISERS)
def test_another_seed_is_another_search(name: str) -> None:
    space = SPACES["linear"]
    seen = [np.concatenate(trace(make_optimiser(name, space, SMALL, seed=seed), space, 4)) for seed in (1, 2)]
    # Nelder-Mead throws no dice.
    assert np.array_equal(*seen) == (name == "nelder-mead")


@pytest.mark.parametrize("name", OPTIMISERS)
def test_particles_that_fail_count_as_the_worst(name: str) -> None:
    space = SPACES["linear"]

    def shaky(positions):
        utilities = judge(space, positions)
        utilities[positions[:, 0] < 0.3] = np.nan
        utilities[positions[:, 1] > 0.6] = -np.inf
        return utilities

    best = climb(make_optimiser(name, space, {"particles": 10, "iterations": 30}, smooth=True, seed=0), shaky)
    assert np.isfinite(best.utility)
    assert best.position[0] >= 0.3


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_search_in_which_all_fails_ends_without_a_best(name: str) -> None:
    optimiser = make_optimiser(name, SPACES["linear"], SMALL, smooth=True, seed=0)
    for _ in range(200):
        if optimiser.done:
            break
        optimiser.tell(optimiser.ask(), np.full(len(optimiser.ask()), np.nan))
    assert optimiser.done
    assert optimiser.best is None


@pytest.mark.parametrize("name", OPTIMISERS)
def test_only_what_was_asked_can_be_told(name: str) -> None:
    optimiser = make_optimiser(name, SPACES["linear"], SMALL, seed=0)
    positions = optimiser.ask()
    np.testing.assert_array_equal(optimiser.ask(), positions)
    with pytest.raises(ValueError, match="asked"):
        optimiser.tell(positions + 0.01, np.zeros(len(positions)))
    with pytest.raises(ValueError, match="asked"):
        optimiser.tell(positions, np.zeros(len(positions) + 1))
    optimiser.tell(positions, judge(SPACES["linear"], positions))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BadParameter, match="optimiser"):
        make_optimiser("gradient", SPACES["linear"], {})
    with pytest.raises(BadParameter, match="inertia"):
        make_optimiser("random", SPACES["linear"], {"inertia": 0.5})
    with pytest.raises(BadParameter, match="particles"):
        make_optimiser("differential-evolution", SPACES["linear"], {"particles": 3})
    with pytest.raises(BadParameter, match="particles"):
        make_optimiser("swarm", SPACES["linear"], {"particles": 2})
    with pytest.raises(BadParameter, match="spread"):
        SwarmSettings(spread=-1)


def test_an_abandoned_scipy_search_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    optimiser = make_optimiser("nelder-mead", SPACES["linear"], SMALL)
    trace(optimiser, SPACES["linear"], 3)
    # Its own thread, by object: those of other tests come to an end when they like.
    (searching,) = [thread for thread in threading.enumerate() if thread not in before]
    del optimiser
    gc.collect()
    searching.join(timeout=10)
    assert not searching.is_alive()


def test_the_default_swarm_also_learns_temperatures() -> None:
    space = SPACES["temperatures"]
    best = climb(ParticleSwarm(space, smooth=True, seed=0), lambda x: judge(space, x))
    np.testing.assert_allclose(best.position[3:], np.log(1.5), atol=1e-5)


def test_an_expert_that_does_not_help_ends_at_weight_zero_exactly() -> None:
    space = SPACES["linear"]
    masses = make_problem(3, 1500, seed=9).masses
    masses[2] = 0.2 * masses[0]
    best = climb(ParticleSwarm(space, smooth=True, seed=0), lambda x: np.log(x @ masses).mean(axis=1))
    assert best.position[2] == 0
    assert space.mixture(best.position).active.keys() == {"e0", "e1"}


def test_without_smoothness_there_is_no_polish() -> None:
    """A utility of steps: the swarm alone, which ends by patience, and never asks for differences."""
    space = SPACES["linear"]

    def steps(positions):
        return np.round(judge(space, positions), 2)

    swarm = ParticleSwarm(space, smooth=False, seed=0)
    best = climb(swarm, steps)
    assert best.utility == steps(best.position[None])[0]
    assert swarm.state()["polish"] is None


def test_the_polish_reaches_the_top_of_a_noisy_hill() -> None:
    """A utility rounded to 1e-9, as float32 sums may be: within 1e-8 of the top, from far away."""
    space = Space(("a", "b", "c", "d"))
    top = np.array([0.8, -0.3, 0.1, 0.6])

    def rounded(positions):
        return np.round(-np.log(np.cosh(positions - top)).sum(axis=1), 9)

    start = space.uniform()
    polish = Polish(space, Best(start, float(rounded(start[None])[0])), rounds=30)
    batches = 0
    while not polish.done:
        polish.tell(rounded(polish.ask()))
        batches += 1
    assert polish.utility >= -1e-8
    assert batches < 40


def test_the_polish_stops_at_once_where_there_is_nothing_to_vary() -> None:
    space = Space(("a",), Rule.LINEAR)
    assert Polish(space, Best(space.uniform(), -1.0), rounds=5).done


def test_one_expert_is_a_search_too() -> None:
    for rule in Rule:
        space = Space(("a",), rule)
        best = climb(ParticleSwarm(space, smooth=True), lambda x: -((x - 0.7) ** 2).sum(axis=1))
        assert best.position[0] == pytest.approx(1.0 if rule is Rule.LINEAR else 0.7, abs=1e-6)


@pytest.mark.parametrize("name", ["swarm", "model-swarms", "cma", "differential-evolution", "random"])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_as_many_iterations_as_asked_are_evaluated(name: str, iterations: int) -> None:
    """Every batch is better than the one before, so that nothing but the budget ends the search."""
    optimiser = make_optimiser(name, SPACES["log-linear"], {"particles": 6, "iterations": iterations}, seed=0)
    batches = 0
    while not optimiser.done:
        batches += 1
        optimiser.tell(optimiser.ask(), np.full(len(optimiser.ask()), float(batches)))
    # CMA-ES and differential evolution may find that they have converged.
    assert batches <= iterations
    assert batches == iterations or name in ("cma", "differential-evolution")


@pytest.mark.parametrize("iterations", [1, 2, 5, 8, 21])
def test_the_polish_keeps_to_the_iterations(iterations: int) -> None:
    given = {"particles": 6, "iterations": iterations}
    optimiser = make_optimiser("swarm", SPACES["log-linear"], given, smooth=True, seed=0)
    batches = 0
    while not optimiser.done:
        batches += 1
        optimiser.tell(optimiser.ask(), -((optimiser.ask() - 0.3) ** 2).sum(axis=1))
    assert batches <= iterations
