"""The space: what is projected lies in it and is nearest, and positions and mixtures are the same thing twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture, Rule
from token_swarm.search.optimisers.quadratic import best_step, negative_definite
from token_swarm.search.optimisers.space import MAX_LOG_TEMPERATURE, Space, crossovers, project_to_simplex

POINTS = arrays(np.float64, st.tuples(st.just(1), st.integers(1, 7)), elements=st.floats(-10, 10, width=32))


@given(POINTS)
def test_the_projection_is_the_nearest_point_of_the_simplex(points) -> None:
    projected = project_to_simplex(points)
    assert (projected >= 0).all()
    assert projected.sum() == pytest.approx(1, abs=1e-12)
    # The nearest point of a convex set: no vertex lies on the far side of the plane through it.
    away = points[0] - projected[0]
    assert ((np.eye(points.shape[1]) - projected[0]) @ away <= 1e-9).all()


def test_the_projection_makes_exact_zeros_and_keeps_them() -> None:
    projected = project_to_simplex(np.array([[0.9, 0.4, -0.3], [2.0, 0.1, 0.0]]))
    assert projected[0, 2] == 0
    assert projected[1].tolist() == [1, 0, 0]
    weights = np.array([[1 / 3, 2 / 3 - 1e-16, 0.0]])
    for _ in range(5):
        weights = project_to_simplex(weights)
        assert weights[0, 2] == 0


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("temperatures", [False, True])
def test_a_mixture_and_its_position_are_the_same(rule: Rule, temperatures: bool) -> None:
    space = Space(("a", "b", "c"), rule, temperatures)
    random = np.random.default_rng(0)
    for position in space.project(random.standard_normal((20, space.dimension))):
        mixture = space.mixture(position)
        assert mixture.rule is rule
        assert set(mixture.temperatures) == (set(space.experts) if temperatures else set())
        np.testing.assert_allclose(space.position(mixture), position, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(space.mixture(space.one_hot()[1]).weights["b"], 1.0)


def test_projection_bounds_temperatures_and_refuses_no_weight_at_all() -> None:
    space = Space(("a", "b"), Rule.LOG_LINEAR, temperatures=True)
    projected = space.project(np.array([[0.0, 0.0, 99.0, -99.0], [-1.5, 3.0, 0.1, 0.0]]))
    assert projected[0].tolist() == [0.5, 0.5, MAX_LOG_TEMPERATURE, -MAX_LOG_TEMPERATURE]
    assert projected[1].tolist() == [-1.5, 3.0, 0.1, 0.0]
    space.mixture(projected[0])


@pytest.mark.parametrize(
    ("mixture", "field"),
    [
        (Mixture({"a": 1.0}, Rule.LINEAR), "rule"),
        (Mixture({"x": 1.0}), "weights"),
        (Mixture({"a": 1.0}, temperatures={"a": 2.0}), "temperatures"),
    ],
)
def test_a_position_outside_of_the_space_is_refused(mixture: Mixture, field: str) -> None:
    with pytest.raises(BadParameter) as refusal:
        Space(("a", "b")).position(mixture)
    assert refusal.value.field == field


def test_a_space_needs_names() -> None:
    for experts in ((), ("a", "a")):
        with pytest.raises(BadParameter, match="experts"):
            Space(experts)


def test_crossovers_lie_between_two_different_parents() -> None:
    children = crossovers(np.eye(4), 300, np.random.default_rng(0))
    assert ((children > 0).sum(axis=1) == 2).all()
    np.testing.assert_allclose(children.sum(axis=1), 1)
    pairs = {tuple(np.flatnonzero(child)) for child in children}
    assert len(pairs) == 6
    assert np.histogram(children[children > 0], bins=4, range=(0, 1))[0].min() > 100
    assert crossovers(np.eye(1), 3, np.random.default_rng(0)).tolist() == [[1], [1], [1]]


@given(st.integers(0, 10_000))
def test_the_quadratic_step_is_the_best_inside_the_bounds(seed: int) -> None:
    """Against many random feasible steps, and against the conditions of an optimum."""
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 6))
    fixed = int(random.integers(0, size + 1))
    gradient = random.standard_normal(size)
    hessian = negative_definite(random.standard_normal((size, size)), 0.1)
    below, above = random.random((2, size)) * random.integers(0, 2, (2, size))
    step = best_step(gradient, hessian, below, above, fixed)
    assert (step >= -below - 1e-12).all()
    assert (step <= above + 1e-12).all()
    assert abs(step[:fixed].sum()) <= 1e-9

    def gain(steps):
        return steps @ gradient + 0.5 * np.einsum("ni,ij,nj->n", steps, hessian, steps)

    towards = random.uniform(-below, above, (500, size)) - step
    # Only directions that keep the sum: take two summed coordinates against each other, the others freely.
    towards[:, :fixed] = 0
    if fixed >= 2:
        first, second = random.integers(fixed, size=(2, 500))
        room = np.minimum((above - step)[first], (step + below)[second]).clip(min=0)
        moved = random.random(500) * room
        towards[np.arange(500), first] += moved
        towards[np.arange(500), second] -= moved
    assert (gain(step + towards * random.random((500, 1))) <= gain(step[None])[0] + 1e-9).all()


def test_bending_a_hessian_keeps_its_directions() -> None:
    bent = negative_definite(np.diag([2.0, -3.0, 0.0]), 0.5)
    np.testing.assert_allclose(np.diag(bent), [-2.5, -3.5, -0.5], atol=1e-11)
