"""C++ and torch eager against the float64 reference."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from tests.kernels.cases import DTYPES, MixCase, adversarial_cases, assert_probabilities, random_case, with_signs
from token_swarm.kernels import STRIDE, UnionMap, eager, native, reference
from token_swarm.particle import Rule
from token_swarm.vocabulary import Vocabulary

IMPLEMENTATIONS = [
    pytest.param(eager, id="eager"),
    pytest.param(
        native,
        id="native",
        marks=pytest.mark.skipif(native.library() is None, reason="the C++ kernels were not built here"),
    ),
]
every_implementation = pytest.mark.parametrize("kernels", IMPLEMENTATIONS)


# Torch sums a softmax in float32 lanes: over 50,257 tokens that alone errs by more than 1e-5.
RELATIVE = {eager: 5e-5, native: 1e-5}


def check_mix(kernels: ModuleType, case: MixCase, rule: Rule) -> None:
    arguments = (case.logits, case.weights, case.temperatures, rule, case.allowed)
    assert_probabilities(kernels.mix(*arguments), reference.mix(*arguments), relative=RELATIVE[kernels])


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 2047, 2049, 5000, 50257])
@pytest.mark.parametrize("rule", Rule)
def test_mix_random(kernels: ModuleType, rule: Rule, width: int, dtype: torch.dtype) -> None:
    case = random_case("random", rows=3, width=width, experts=3, dtype=dtype, seed=width)
    check_mix(kernels, case, rule)
    if rule is Rule.LOG_LINEAR:
        check_mix(kernels, with_signs(case), rule)


@every_implementation
@pytest.mark.parametrize("case", adversarial_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("rule", Rule)
def test_mix_adversarial(kernels: ModuleType, rule: Rule, case: MixCase) -> None:
    if case.name == "huge range":
        # Logits of thousands: float32 itself holds them to 2^-11 only, which the exponential makes 5e-4.
        arguments = (case.logits, case.weights, case.temperatures, rule, case.allowed)
        assert_probabilities(kernels.mix(*arguments), reference.mix(*arguments), relative=5e-3)
    else:
        check_mix(kernels, case, rule)
    if rule is Rule.LOG_LINEAR and case.name != "huge range":
        check_mix(kernels, with_signs(case), rule)


@every_implementation
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("rule", Rule)
def test_mix_reads_rows_of_a_wider_table(kernels: ModuleType, rule: Rule, experts: int) -> None:
    case = random_case("strided", rows=4, width=64, experts=experts, dtype=torch.float32, seed=1)
    wide = tuple(torch.full((4, 80), math.nan).index_copy_(1, torch.arange(64), table)[:, :64] for table in case.logits)
    arguments = (case.weights, case.temperatures, rule, case.allowed)
    assert torch.equal(kernels.mix(wide, *arguments), kernels.mix(case.logits, *arguments))


SETTINGS = [
    # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.0, 3, 0.5, 0.1),
    (0.7, 0, 1.0, 0.0),
    (1.3, 0, 1.0, 0.0),
    (0.1, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 40, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.01, 0.0),
    (1.0, 0, 0.9999, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (0.8, 50, 0.95, 0.02),
    (1.5, 100000, 0.3, 0.001),
]


def columns(rows: list[tuple[float, int, float, float]]) -> tuple[torch.Tensor, ...]:
    heat, count, nucleus, least = zip(*rows, strict=True)
    return (
        torch.tensor(heat, dtype=torch.float64),
        torch.tensor(count, dtype=torch.int64),
        torch.tensor(nucleus, dtype=torch.float64),
        torch.tensor(least, dtype=torch.float64),
    )


def distributions(width: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(width)
    peaked = torch.softmax(torch.randn(width, generator=random) * 4, 0)
    flat = torch.softmax(torch.randn(width, generator=random) * 1e-3, 0)
    ties = torch.full((width,), 1.0)
    ties[: width // 3] = 2.0
    holes = peaked.clone()
    holes[::2] = 0
    return {
        "peaked": peaked,
        # Every value in one bin of the histogram: more than the buffer of candidates holds.
        "flat": flat,
        "ties": ties / ties.sum(),
        "equal": torch.full((width,), 1 / width),
        "holes": holes / holes.sum(),
        "bad": torch.full((width,), math.nan),
    }


@every_implementation
@pytest.mark.parametrize("width", [2, 33, 50257])
@pytest.mark.parametrize("kind", list(distributions(4)))
def test_shape(kernels: ModuleType, kind: str, width: int) -> None:
    table = distributions(width)[kind].expand(len(SETTINGS), -1)
    settings = columns(SETTINGS)
    ours, theirs = kernels.shape(table, *settings), reference.shape(table, *settings)
    # The kept sets may differ only by tokens where the mass reaches top_p to within the rounding of float32 sums.
    different = ((ours > 0) != (theirs > 0)) & ~((ours == 0) & (theirs < 1e-37))  # float32 ends there
    for row in different.any(1).nonzero()[:, 0].tolist():
        assert SETTINGS[row][2] < 1
        assert float(torch.where(different[row], table[row].double(), 0.0).sum()) <= 1e-6
    same = ~different.any(1)
    assert_probabilities(ours[same].float(), theirs[same], relative=2e-5 if kind == "peaked" else 1e-5)


@every_implementation
@pytest.mark.parametrize("width", [1, 5, 2048, 4097, 50257])
def test_choose(kernels: ModuleType, width: int) -> None:
    random = torch.Generator().manual_seed(3)
    table = torch.softmax(torch.randn(64, width, generator=random) * 3, dim=1)
    table[5] = math.nan
    table[6, width // 2 :] = 0
    table[7] = 1 / width
    uniforms = torch.rand(64, generator=random, dtype=torch.float64)
    uniforms[8], uniforms[9], uniforms[6] = 0.0, 1 - 2**-53, 1 - 2**-53
    greedy = torch.arange(64) % 4 == 3
    if width == 1:
        table[6] = 1.0
    tokens, log_probs = kernels.choose(table, uniforms, greedy)
    expected, expected_log_probs = reference.choose(table, uniforms, greedy)
    assert torch.equal(tokens, expected)
    assert torch.allclose(log_probs, expected_log_probs, rtol=0, atol=1e-6, equal_nan=True)
    assert tokens[5] == -1


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", Rule)
def test_sample_is_the_composition(kernels: ModuleType, rule: Rule, dtype: torch.dtype) -> None:
    case = random_case("sample", rows=len(SETTINGS), width=5000, experts=2, dtype=dtype, seed=9)
    settings = columns(SETTINGS)
    uniforms = torch.rand(len(SETTINGS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = (case.logits, case.weights, case.temperatures, rule, case.allowed)
    ours = kernels.choose(kernels.shape(kernels.mix(*arguments), *settings), uniforms, settings[0] == 0)
    exact = reference.choose(reference.shape(reference.mix(*arguments), *settings), uniforms, settings[0] == 0)
    assert torch.equal(ours[0], exact[0])
    assert torch.allclose(ours[1], exact[1], rtol=0, atol=2e-5)


@every_implementation
@pytest.mark.parametrize("width", [1, 3, 4, 5, 4099])
def test_prefix_mass(kernels: ModuleType, width: int) -> None:
    random = torch.Generator().manual_seed(width)
    table = torch.softmax(torch.randn(3, width, generator=random) * 6, dim=1)
    order = torch.randperm(width, generator=random)[: max(1, width - 2)]
    ordered, cumulative = kernels.prefix_mass(table, order)
    expected, sums = reference.prefix_mass(table.double(), order)
    assert torch.equal(ordered.double(), expected)
    assert cumulative.dtype == torch.float64
    assert torch.allclose(cumulative, sums, rtol=1e-14, atol=0)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_order_that_is_there_already(kernels: ModuleType, dtype: torch.dtype) -> None:
    """The number of tokens in place of their ids gives the same."""
    random = torch.Generator().manual_seed(4)
    logits = (torch.randn(4, 3000, generator=random) * 5).to(dtype)
    logits[1, 7] = math.nan
    logits[2, 2500:] = math.nan
    heat = torch.tensor([1.0, 1.0, 0.7, 1.3], dtype=torch.float64)
    found = kernels.softmax_masses(logits, heat, 2500, 2400)
    expected = kernels.softmax_masses(logits, heat, torch.arange(2500), 2400)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-12, equal_nan=True)
    law = torch.softmax(logits[::3].float(), 1)
    for count, every in ((2500, 8), (2497, 8), (2500, 3)):
        ordered, sums = kernels.prefix_mass(law, count, every)
        expected, exact = kernels.prefix_mass(law, torch.arange(count), every)
        assert torch.equal(ordered, expected)
        torch.testing.assert_close(sums, exact, rtol=1e-14, atol=0)


@every_implementation
@pytest.mark.parametrize("every", [1, 3, 16])
def test_prefix_mass_of_every_few_tokens(kernels: ModuleType, every: int) -> None:
    table = torch.softmax(torch.randn(3, 77, generator=torch.Generator().manual_seed(2)) * 6, dim=1)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(3))[:70]
    ordered, sums = kernels.prefix_mass(table, order, every)
    expected, exact = reference.prefix_mass(table.double(), order, every)
    assert torch.equal(ordered.double(), expected)
    assert sums.shape == (3, 70 // every + 1)
    assert sums.is_contiguous()
    assert torch.allclose(sums, exact, rtol=1e-14, atol=0)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "count", "tokens"), [(2, 1, 1), (40, 33, 31), (60, 60, 48), (90, 80, 72), (5003, 4999, 4096)]
)
def test_softmax_masses(kernels: ModuleType, width: int, count: int, tokens: int, dtype: torch.dtype) -> None:
    """Rows of a wider table; offsets that float32 has few digits for; what takes no part is not looked at."""
    random = torch.Generator().manual_seed(width)
    table = torch.full((6, width + 5), math.nan)
    table[:, :width] = torch.randn(6, width, generator=random) * 4
    table[1] += 1000
    table[2, : width // 2] = -math.inf
    table[3] *= 30
    logits, order = table.to(dtype)[:, :width], torch.randperm(width, generator=random)[:count]
    logits[:, [i for i in range(width) if i not in set(order.tolist())]] = math.nan
    logits[4, order[count // 2]] = math.nan
    logits[5, order[0]] = math.inf
    logits[2, order[-1]] = 1.0
    heat = 0.5 + torch.rand(6, generator=random, dtype=torch.float64)
    ordered, sums = kernels.softmax_masses(logits, heat, order, tokens)
    expected, exact = reference.softmax_masses(logits, heat, order, tokens)
    assert expected[4:].isnan().all()
    assert not expected[:4].isnan().any()
    assert_probabilities(ordered, expected, relative=2e-5 if kernels is eager else 1e-5)
    assert sums.dtype == torch.float64
    assert sums.shape == (6, tokens // STRIDE + 1)
    # Of the probabilities that are there, to the last digits.
    kept = torch.nn.functional.pad(ordered[:4, :tokens].double().cumsum(1), (1, 0))[:, ::STRIDE]
    assert torch.allclose(sums[:4], kept, rtol=1e-13, atol=0)
    assert sums[4:, 1:].isnan().all()
    assert torch.allclose(sums[:4], exact[:4], rtol=2e-5, atol=1e-30)


def vocabularies() -> list[Vocabulary]:
    letters = [bytes([65 + i]) for i in range(20)]
    first = Vocabulary((*letters, b"AB", b"A", None, b"CD", None), eos_ids=(22, 24))
    second = Vocabulary((None, b"CD", *letters[10:], b"XYZ", b"XYZ", b"XYZ", b"\xff"), eos_ids=(0,))
    third = Vocabulary((*[bytes([97 + i]) for i in range(9)], b"CD", b"AB", None), eos_ids=(11,))
    return [first, second, third]


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", Rule)
def test_union(kernels: ModuleType, rule: Rule, dtype: torch.dtype) -> None:
    tables = vocabularies()
    union = UnionMap.build(tables)
    random = torch.Generator().manual_seed(2)
    logits = [(torch.randn(5, v.width, generator=random) * 4).to(dtype) for v in tables]
    logits[0][1, 3] = -math.inf
    logits[1][2, 3] = math.nan
    weights = torch.rand(5, 3, generator=random, dtype=torch.float64)
    weights[3, 1] = 0
    weights[4] = 0
    temperatures = 0.5 + torch.rand(5, 3, generator=random, dtype=torch.float64)
    if rule is Rule.LOG_LINEAR:
        weights[0, 2] = -0.4
    arguments = (logits, weights, temperatures, rule, union, math.log(1e-6))
    exact = reference.mix_union(*arguments)
    assert_probabilities(kernels.mix_union(*arguments), exact)
    assert exact[2].isnan().all()
    assert exact[4].isnan().all()
    assert torch.allclose(exact[[0, 1, 3]].sum(1), torch.ones(3, dtype=torch.float64))


def scoring_case(
    experts: int, positions: int, symbols: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    laws = torch.log_softmax(torch.randn(positions, experts, symbols, generator=random) * 4, dim=2)
    targets = torch.randint(0, symbols, (positions,), generator=random)
    lengths = torch.tensor([0, 3, 1, positions // 2, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0), torch.tensor([positions])])
    return laws, targets, offsets


@every_implementation
@pytest.mark.parametrize("experts", [1, 2, 3, 6])
@pytest.mark.parametrize("positions", [12, 700])
def test_score_linear(kernels: ModuleType, positions: int, experts: int) -> None:
    laws, targets, offsets = scoring_case(experts, positions, 257, seed=positions)
    masses = laws.exp()[torch.arange(positions), :, targets].T.contiguous()
    masses[0, 0] = 1e-30
    masses[:, 1] = torch.tensor([1e-37] + [0.0] * (experts - 1))
    weights = torch.rand(7, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[1] = torch.eye(experts, dtype=torch.float64)[0]
    weights[2, 0] = 1e-14
    exact = reference.score_linear(masses, weights, offsets)
    ours = kernels.score_linear(masses, weights, offsets)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-4), (ours - exact).abs().max()
    masses[:, positions - 2] = 0
    assert bool(kernels.score_linear(masses, weights, offsets)[:, -1].isneginf().all())


@every_implementation
@pytest.mark.parametrize("experts", [1, 2, 3, 6])
@pytest.mark.parametrize("symbols", [2, 257, 5000])
def test_score_log_linear(kernels: ModuleType, symbols: int, experts: int) -> None:
    laws, targets, offsets = scoring_case(experts, 40, symbols, seed=symbols)
    weights = torch.randn(6, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[1] = torch.eye(experts, dtype=torch.float64)[0]
    weights[2] *= 8
    exact = reference.score_log_linear(laws, targets, weights, offsets)
    assert torch.allclose(kernels.score_log_linear(laws, targets, weights, offsets), exact, rtol=1e-6, atol=1e-4)
    laws[3, 0, 0] = -math.inf
    targets[3] = 1
    targets[5] = 0
    laws[5, experts - 1, 0] = -math.inf
    exact = reference.score_log_linear(laws, targets, weights, offsets)
    ours = kernels.score_log_linear(laws, targets, weights, offsets)
    assert torch.equal(ours.isneginf(), exact.isneginf())
    assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-4)


@every_implementation
def test_particles_of_other_experts_and_signs_are_scored_side_by_side(kernels: ModuleType) -> None:
    """Neighbours that ask the same experts share a pass; what one needs is not done to the other."""
    laws, targets, offsets = scoring_case(3, 33, 257, seed=3)
    laws[::5, 1, 7] = -math.inf  # of an expert that some weigh negatively: excluded all the same
    laws[4, 2] = -400
    laws[4, 2, 11] = 0  # no two agree: the bounds of the joint law say nothing
    targets[targets == 7] = 8
    signs = [
        [1, 1, 1],
        [1, 1, -1],
        [1, -1, 1],
        [-2, 3, 1],
        [-1, -1, -1],
        [0, 1, 1],
        [0, 1, 2],
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
        [8, 4, 9],
    ]
    weights = torch.tensor(signs, dtype=torch.float64) * 0.37
    for count in range(1, len(signs) + 1):
        arguments = (laws, targets, weights[:count], offsets)
        ours, exact = kernels.score_log_linear(*arguments), reference.score_log_linear(*arguments)
        assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-4), (ours - exact).abs().max()


@every_implementation
def test_no_particles_have_no_scores(kernels: ModuleType) -> None:
    laws, targets, offsets = scoring_case(2, 12, 257, seed=3)
    weights = torch.zeros(0, 2, dtype=torch.float64)
    assert kernels.score_log_linear(laws, targets, weights, offsets).shape == (0, 6)
    assert kernels.score_linear(laws[:, :, 0].T.exp().contiguous(), weights, offsets).shape == (0, 6)


@pytest.mark.skipif(native.library() is None, reason="the C++ kernels were not built here")
def test_every_instruction_set_agrees() -> None:
    """What an older processor runs is the same source; it must give the same results."""
    best = native.instruction_set()
    case = with_signs(random_case("levels", rows=len(SETTINGS), width=5003, experts=3, dtype=torch.bfloat16, seed=4))
    laws, targets, offsets = scoring_case(3, 40, 257, seed=1)
    masses = laws.exp()[torch.arange(40), :, targets].T.contiguous()
    uniforms = torch.rand(len(SETTINGS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def results() -> list[torch.Tensor]:
        mixed = native.mix(case.logits, case.weights, case.temperatures, Rule.LOG_LINEAR, case.allowed)
        linear = native.mix(case.logits, case.weights.abs(), case.temperatures, Rule.LINEAR, case.allowed)
        shaped = native.shape(mixed, *columns(SETTINGS))
        return [
            mixed,
            linear,
            shaped,
            *native.choose(shaped, uniforms, uniforms > 0.8),
            native.score_linear(masses, case.weights[:5].abs(), offsets),
            native.score_log_linear(laws, targets, case.weights[:5], offsets),
        ]

    expected = results()
    try:
        for level in ("baseline", "AVX2"):
            native.instruction_set(at_most=level)
            for ours, theirs in zip(results(), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12)
    finally:
        assert native.instruction_set(at_most="AVX-512") == best
