"""What the Triton kernels have to do, as tests that take a `device`: "cpu" under Triton's interpreter, or "cuda".

`test_triton_interpreter.py` and `test_triton_gpu.py` run them.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import MixCase, random_case, with_signs
from tests.kernels.triton_inputs import (
    SETTINGS,
    SMALLEST_NORMAL,
    adversarial_rows,
    assert_same,
    expected_mix,
    mix_on,
    on,
    scored,
    settings,
    tied_rows,
    union_case,
)
from token_swarm.errors import BadParameter
from token_swarm.kernels import reference, triton
from token_swarm.kernels.triton import shaping
from token_swarm.particle import Rule

# ---------------------------------------------------------------- mix


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize(
    ("width", "experts", "dtype"),
    [
        (1, 2, torch.float32),
        (63, 1, torch.bfloat16),
        (64, 3, torch.float16),
        (65, 3, torch.float32),
        (300, 5, torch.bfloat16),
    ],
)
def test_mix_equals_the_reference(device, blocks, rule, width, experts, dtype):
    blocks(64)
    case = random_case("random", rows=2, width=width, experts=experts, dtype=dtype, seed=width, scale=6.0)
    if rule is Rule.LOG_LINEAR:
        case = with_signs(case)
    assert_same(mix_on(device, case, rule), expected_mix(case, rule))


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("case", adversarial_rows(), ids=lambda case: case.name)
def test_mix_of_adversarial_rows(device, blocks, rule, case):
    blocks(32)
    assert_same(mix_on(device, case, rule), expected_mix(case, rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", Rule)
def test_mix_of_a_real_vocabulary(device, rule, dtype):
    case = random_case("GPT-2's width", rows=1, width=50_257, experts=3, dtype=dtype, seed=1, scale=5.0)
    if rule is Rule.LOG_LINEAR:
        case = with_signs(case)
    ours = mix_on(device, case, rule)
    assert_same(ours, expected_mix(case, rule))
    assert float(ours.double().sum()) == pytest.approx(1, abs=1e-5)


def test_weights_that_cancel_cost_no_digits(device, blocks):
    blocks(64)
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1, 150, generator=generator) * 3000
    near = base + torch.randn(1, 150, generator=generator)
    case = MixCase(
        "cancelling",
        (base, near),
        torch.tensor([[-7.0, 7.0]], dtype=torch.float64),
        torch.tensor([[0.9, 0.9]], dtype=torch.float64),
        torch.ones(150, dtype=torch.bool),
    )
    assert_same(mix_on(device, case, Rule.LOG_LINEAR), expected_mix(case, Rule.LOG_LINEAR))


@pytest.mark.parametrize("rule", Rule)
def test_the_largest_floats_do_not_overflow(device, blocks, rule):
    blocks(16)
    rows = torch.tensor([[3.4e38, -3.4e38, 0.0, 3.4e38, 1.0], [-3.4e38, -3.4e38, -3.4e38, -3.4e38, -3.3e38]])
    one = torch.tensor([[1.0, 0.5], [2.0, 1.0]], dtype=torch.float64)
    case = MixCase("largest", (rows, rows.flip(1)), one, one * 0.3, torch.ones(5, dtype=torch.bool))
    assert_same(mix_on(device, case, rule), expected_mix(case, rule))


def test_rows_may_lie_apart(device, blocks):
    blocks(64)
    case = random_case("strided", rows=3, width=100, experts=2, dtype=torch.float32, seed=8)
    wide = [torch.full((3, 130), math.nan) for _ in case.logits]
    for buffer, table in zip(wide, case.logits, strict=True):
        buffer[:, :100] = table
    views = tuple(buffer.to(device)[:, :100] for buffer in wide)
    rest = on(device, (case.weights, case.temperatures, case.allowed))
    ours = triton.mix(views, rest[0], rest[1], Rule.LINEAR, rest[2])
    assert_same(ours, expected_mix(case, Rule.LINEAR))


def test_no_rows_are_no_work(device):
    case = random_case("empty", rows=1, width=9, experts=2, dtype=torch.float32, seed=0)
    none = MixCase("", tuple(t[:0] for t in case.logits), case.weights[:0], case.temperatures[:0], case.allowed)
    for rule in Rule:
        assert mix_on(device, none, rule).shape == (0, 9)


# ---------------------------------------------------------------- union


@pytest.mark.parametrize(
    ("rule", "floor", "dtype"),
    [
        (Rule.LINEAR, -30.0, torch.float16),
        (Rule.LOG_LINEAR, -30.0, torch.bfloat16),
        (Rule.LOG_LINEAR, -math.inf, torch.float32),
    ],
)
def test_union_equals_the_reference(device, blocks, rule, floor, dtype):
    blocks(32)
    logits, weights, temperatures, union = union_case(dtype, rule)
    expected = reference.mix_union(logits, weights, temperatures, rule, union, floor)
    assert expected.isnan().all(1).tolist() == [False, False, True, True, True]
    ours = triton.mix_union(on(device, logits), weights.to(device), temperatures.to(device), rule, union, floor)
    assert_same(ours, expected)


def test_a_union_says_which_logits_are_too_narrow(device):
    logits, weights, temperatures, union = union_case(torch.float32, Rule.LINEAR)
    logits[1] = logits[1][:, :20]
    with pytest.raises(BadParameter, match=r"logits\[1\]: '20 wide'"):
        triton.mix_union(on(device, logits), weights, temperatures, Rule.LINEAR, union, -30.0)


# ---------------------------------------------------------------- shape, choose, sample


@pytest.mark.parametrize("capacity", [256, 8])
@pytest.mark.parametrize("which", SETTINGS, ids=str)
def test_shape_equals_the_reference(device, blocks, monkeypatch, which, capacity):
    """With room for 8 candidates most rows take the slow path, with 256 none does."""
    blocks(256)
    monkeypatch.setattr(shaping, "CAPACITY", capacity)
    rows = tied_rows()
    expected = reference.shape(rows, *settings("cpu", which, 6))
    ours = triton.shape(rows.to(device), *settings(device, which, 6)).cpu()
    assert torch.equal((ours > 0) & (expected > SMALLEST_NORMAL), expected > SMALLEST_NORMAL)
    assert torch.equal(expected[ours > 0] > 0, torch.ones(int((ours > 0).sum()), dtype=torch.bool))
    assert_same(ours, expected)


@pytest.mark.parametrize("capacity", [256, 8])
def test_rows_have_their_own_settings(device, blocks, monkeypatch, capacity):
    """And several tiles."""
    blocks(64)
    monkeypatch.setattr(shaping, "CAPACITY", capacity)
    rows = torch.softmax(torch.randn(len(SETTINGS), 150, generator=torch.Generator().manual_seed(2)), -1)
    columns = [torch.tensor(column) for column in zip(*SETTINGS, strict=True)]
    assert_same(triton.shape(rows.to(device), *on(device, columns)), reference.shape(rows, *columns))


def test_a_threshold_is_exact_between_neighbouring_floats(device):
    """Top-k, min-p and top-p have to tell probabilities apart that differ in their last bit."""
    bits = torch.full((1, 40), 0.02).view(torch.int32) + torch.arange(40, dtype=torch.int32) % 7
    rows = bits.view(torch.float32)
    ranked = rows[0].sort(descending=True).values.double()
    for which in (
        (1.0, 9, 1.0, 0.0),
        (3.0, 9, 1.0, 0.0),
        (1.0, 0, 1.0, float(ranked[11] / ranked[0])),
        (1.0, 0, 0.4, 0.0),
    ):
        expected = reference.shape(rows, *settings("cpu", which, 1))
        ours = triton.shape(rows.to(device), *settings(device, which, 1)).cpu()
        assert 0 < int((expected > 0).sum()) < 40
        assert torch.equal(ours > 0, expected > 0)


UNIFORMS = [0.0, 2.0**-60, 0.5, 1 - 2.0**-53]


@pytest.mark.parametrize(("uniform", "greedy"), [*((uniform, False) for uniform in UNIFORMS), (0.5, True)])
def test_choose_equals_the_reference(device, blocks, uniform, greedy):
    blocks(128)
    rows = tied_rows()
    arguments = (torch.full((6,), uniform, dtype=torch.float64), torch.full((6,), greedy))
    tokens, log_probs = on("cpu", triton.choose(rows.to(device), *on(device, arguments)))
    expected = reference.choose(rows, *arguments)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(log_probs, expected[1], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_choose_inverts_the_distribution_everywhere(device, blocks):
    """At uniforms just below and at every step of the cumulative distribution; sums of eighths have no rounding."""
    blocks(16)
    row = torch.tensor([0, 1, 0, 2, 0, 0, 1, 3, 0, 1] * 4) / 32
    steps = row.double().cumsum(0).unique()[:-1]
    uniforms = torch.cat([steps, (steps - 2.0**-40).clamp(min=0)])
    rows = row.expand(uniforms.numel(), -1).contiguous()
    never = torch.zeros(uniforms.numel(), dtype=torch.bool)
    tokens, _ = triton.choose(rows.to(device), uniforms.to(device), never.to(device))
    assert torch.equal(tokens.cpu(), reference.choose(rows, uniforms, never)[0])


@pytest.mark.parametrize("rule", Rule)
def test_sample_equals_the_reference(device, blocks, rule):
    blocks(128)
    rows = len(SETTINGS)
    case = random_case("sampled", rows=rows, width=200, experts=3, dtype=torch.float32, seed=11, scale=3.0)
    case.logits[1][4, 30] = math.nan if bool(case.allowed[30]) else 0.0
    case.logits[1][4, int(case.allowed.nonzero()[3])] = math.nan
    columns = [torch.tensor(column) for column in zip(*SETTINGS, strict=True)]
    uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    moved = on(device, (list(case.logits), case.weights, case.temperatures, case.allowed, columns, uniforms))
    tokens, log_probs = triton.sample(moved[0], moved[1], moved[2], rule, moved[3], *moved[4], moved[5])
    shaped = reference.shape(expected_mix(case, rule), *columns)
    expected = reference.choose(shaped, uniforms, columns[0] == 0)
    assert int(tokens[4]) == -1
    assert torch.equal(tokens.cpu(), expected[0])
    torch.testing.assert_close(log_probs.cpu(), expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------- prefix sums


@pytest.mark.parametrize(("width", "tokens"), [(1, 1), (300, 300), (300, 129), (300, 0)])
def test_prefix_mass_equals_the_reference(device, blocks, width, tokens):
    blocks(64)
    generator = torch.Generator().manual_seed(width)
    rows = torch.softmax(12 * torch.randn(3, width, generator=generator), -1)
    rows[0, width // 2] = 0
    rows[2] = math.nan
    order = torch.randperm(width, generator=generator)[:tokens]
    ordered, total = on("cpu", triton.prefix_mass(rows.to(device), order.to(device)))
    expected = reference.prefix_mass(rows, order)
    assert torch.equal(ordered[:2], expected[0][:2])
    assert torch.equal(total.isnan(), expected[1].isnan())
    torch.testing.assert_close(total[:2], expected[1][:2], rtol=0, atol=1e-15)
    masses = total[:2].diff()
    assert bool((masses >= 0).all())
    assert not masses[ordered[:2] == 0].any()


# ---------------------------------------------------------------- scoring


def assert_scores(ours: Tensor, expected: Tensor) -> None:
    """The same scores are infinite or not numbers, the others agree."""
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("particles", "symbols"), [(1, 70), (40, 257), (5, 1500)])
def test_score_log_linear_equals_the_reference(device, particles, symbols):
    laws, targets, weights, offsets = scored(particles, symbols)
    expected = reference.score_log_linear(laws, targets, weights, offsets)
    assert bool(expected.isinf().any()) == (particles > 1)
    ours = triton.score_log_linear(laws.to(device), targets.to(device), weights.to(device), offsets.to(device))
    assert_scores(ours, expected)


def test_laws_of_one_symbol_or_none(device):
    """A symbol that is certain costs nothing; where no symbol is left the score is not a number."""
    laws = torch.tensor([[[0.0], [0.0]], [[0.0], [-math.inf]]])
    weights = torch.tensor([[1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    arguments = (laws, torch.zeros(2, dtype=torch.int64), weights, torch.tensor([0, 1, 2]))
    expected = reference.score_log_linear(*arguments)
    assert expected.isnan().tolist() == [[False, True], [False, False]]
    assert_scores(triton.score_log_linear(*on(device, arguments)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("particles", [1, 9, 70])
def test_score_linear_equals_the_reference(device, particles, dtype):
    generator = torch.Generator().manual_seed(particles)
    masses = (torch.rand(3, 1100, generator=generator, dtype=torch.float64) ** 9).to(dtype)
    masses[:, 777] = 0
    weights = torch.rand(particles, 3, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, 7, 7, 30, 700, 1100])
    ours = triton.score_linear(masses.to(device), weights.to(device), offsets.to(device))
    expected = reference.score_linear(masses, weights, offsets)
    assert bool(expected.isinf().any())
    assert_scores(ours, expected)


def test_no_items_have_no_scores(device):
    laws, targets, weights, _ = on(device, scored(3, 257))
    none = torch.tensor([0], device=device)
    assert triton.score_log_linear(laws, targets, weights, none).shape == (3, 0)
    assert triton.score_linear(torch.ones(3, 4, device=device), weights, none).shape == (3, 0)
