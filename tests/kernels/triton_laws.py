"""What the Triton kernels have to do, as tests that take a `device`: "cpu" under Triton's interpreter, or "cuda".

`test_triton_interpreter.py` and `test_triton_gpu.py` run them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import MixCase, adversarial_cases, random_case, with_signs
from token_swarm.errors import BadParameter
from token_swarm.kernels import reference, triton
from token_swarm.kernels.triton import launch, shaping
from token_swarm.kernels.union_map import UnionMap
from token_swarm.particle import Rule
from token_swarm.vocabulary import Vocabulary

SMALLEST_NORMAL = 2.0**-126
"""Below it float32 has fewer digits, and a GPU may round to 0."""


def assert_same(ours: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """The same rows are bad, and every probability is within `relative` of the definition's."""
    ours = ours.cpu().double()
    assert ours.shape == expected.shape
    assert torch.equal(ours.isnan(), expected.isnan())
    good = ~expected.isnan()
    error = (ours - expected)[good].abs() - SMALLEST_NORMAL
    assert bool((error <= relative * expected[good].abs()).all()), f"{float((error / expected[good].abs()).max())}"


def on(device: str, values: Any) -> Any:
    """The tensors among `values` on `device`."""
    if isinstance(values, Tensor):
        return values.to(device)
    return type(values)(on(device, value) for value in values) if isinstance(values, list | tuple) else values


def mix_on(device: str, case: MixCase, rule: Rule) -> Tensor:
    moved = on(device, (case.logits, case.weights, case.temperatures, case.allowed))
    return triton.mix(moved[0], moved[1], moved[2], rule, moved[3])


def expected_mix(case: MixCase, rule: Rule) -> Tensor:
    return reference.mix(case.logits, case.weights, case.temperatures, rule, case.allowed)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the tile's size, so that a short row has several tiles."""
    return lambda size: monkeypatch.setattr(launch, "BLOCK", size)


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


def adversarial_rows() -> list[MixCase]:
    """The adversarial cases, every row once: most cases change one row of the same six."""
    seen: set[tuple[bytes, ...]] = set()
    kept = []
    for case in adversarial_cases():
        parts = (*case.logits, case.weights, case.temperatures)
        keys = [(*(bits(part[row]) for part in parts), bits(case.allowed)) for row in range(len(case.weights))]
        new = [row for row, key in enumerate(keys) if key not in seen]
        seen.update(keys)
        logits = tuple(table[new] for table in case.logits)
        kept.append(MixCase(case.name, logits, case.weights[new], case.temperatures[new], case.allowed))
    return kept


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


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


def three_vocabularies() -> UnionMap:
    """Overlapping vocabularies with twins of different number, ids that take no part, and two ends of the text."""

    def table(low: int, twins: int) -> tuple[bytes | None, ...]:
        own = [b"%d" % token for token in range(low, low + 60)]
        return (None, *own, *([b"%d" % (low + 7)] * twins), None, None)

    tables = [table(0, 0), table(10, 3), table(45, 1)]
    return UnionMap.build([Vocabulary(own, (0, len(own) - 1)) for own in tables])


def union_case(dtype: torch.dtype, rule: Rule) -> tuple[list[Tensor], Tensor, Tensor, UnionMap]:
    union = three_vocabularies()
    generator = torch.Generator().manual_seed(4)
    logits = [(4 * torch.randn(5, 70, generator=generator)).to(dtype) for _ in range(3)]
    weights = 0.1 + torch.rand(5, 3, generator=generator, dtype=torch.float64)
    if rule is Rule.LOG_LINEAR:
        weights[:, 1] *= -0.5
    weights[1, 2] = 0
    weights[4] = 0
    # What takes no part is never looked at, nor is an expert of weight 0.
    logits[0][:, 61] = math.nan
    logits[2][:, 69] = math.inf
    logits[2][1] = math.nan
    logits[0][0, 5:9] = -math.inf
    logits[1][2, 3] = math.nan
    logits[1][3, 62] = math.inf
    return logits, weights, 0.5 + torch.rand(5, 3, generator=generator, dtype=torch.float64), union


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


def tied_rows() -> Tensor:
    """float32 [6, 150]: random, equal, one-hot, ties at every threshold (sums without rounding), nearly equal, bad."""
    rows = torch.zeros(6, 150)
    generator = torch.Generator().manual_seed(6)
    rows[0] = torch.softmax(2 * torch.randn(150, generator=generator), -1)
    rows[1] = 1 / 128
    rows[2, 77] = 1.0
    rows[3, 20:28] = 1 / 16
    rows[3, 60:76] = 1 / 32
    rows[4] = torch.softmax(0.01 * torch.randn(150, generator=generator), -1)
    rows[5] = math.nan
    return rows


# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 3, 0.5, 0.2),
    (1.0, 10, 1.0, 0.0),
    (1.0, 0, 0.5, 0.0),
    (0.7, 0, 0.97, 0.0),
    (1.3, 12, 0.8, 0.05),
    (2.0, 150, 0.999, 0.3),
    (0.1, 5, 0.2, 0.0),
    (1.0, 149, 0.0, 1.0),
]


def settings(device: str, which: tuple[float, int, float, float], rows: int) -> list[Tensor]:
    return [
        torch.full((rows,), which[0], dtype=torch.float64, device=device),
        torch.full((rows,), which[1], dtype=torch.int64, device=device),
        torch.full((rows,), which[2], dtype=torch.float64, device=device),
        torch.full((rows,), which[3], dtype=torch.float64, device=device),
    ]


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


def scored(particles: int, symbols: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(laws, targets, weights, offsets): excluded symbols and targets, weights of 0, an empty item, one of 2 chunks."""
    generator = torch.Generator().manual_seed(symbols)
    positions = 22 if symbols == 70 else 5
    laws = torch.log_softmax(15 * torch.randn(positions, 3, symbols, generator=generator), -1)
    laws[0, 1, 1:4] = -math.inf
    laws[1, 2, 2] = -math.inf
    targets = torch.randint(4, symbols, (positions,), generator=generator)
    targets[1] = 2
    weights = 3 * torch.randn(particles, 3, generator=generator, dtype=torch.float64)
    weights[-2:-1] = 0
    weights[-1, 2] = 0
    return laws, targets, weights, torch.tensor([0, 1, 3, 3, positions])


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


# ---------------------------------------------------------------- memory and order

Inputs = Callable[[Any], Any]


def everything(place: Inputs) -> dict[str, Callable[[], Any]]:
    """Every public function on several tiles, items and chunks; `place` puts the inputs into memory."""
    case = random_case("small", rows=2, width=70, experts=2, dtype=torch.float32, seed=21)
    half = random_case("small", rows=2, width=70, experts=2, dtype=torch.bfloat16, seed=22)
    mixing = {
        f"mix {rule.value} {own.logits[0].dtype}": place(
            (list(own.logits), own.weights, own.temperatures, rule, own.allowed)
        )
        for own in (case, half)
        for rule in Rule
    }
    calls: dict[str, Callable[[], Any]] = {
        name: lambda arguments=arguments: triton.mix(*arguments) for name, arguments in mixing.items()
    }
    rows = place(tied_rows()[[0, 3, 4, 5]])
    some = place([torch.tensor(column) for column in zip(*(SETTINGS[i] for i in (3, 5, 4, 2)), strict=True)])
    uniforms = place(torch.tensor([0.2, 0.9, 0.5, 0.1], dtype=torch.float64))
    greedy = place(torch.tensor([False, True, False, False]))
    calls["shape"] = lambda: triton.shape(rows, *some)
    calls["choose"] = lambda: triton.choose(rows, uniforms, greedy)
    drawn = place((list(case.logits), case.weights, case.temperatures))
    pair = [column[:2] for column in some]
    calls["sample"] = lambda: triton.sample(
        *drawn, Rule.LINEAR, mixing["mix linear torch.float32"][4], *pair, uniforms[:2]
    )
    order = place(torch.randperm(150, generator=torch.Generator().manual_seed(1)))
    calls["prefix_mass"] = lambda: triton.prefix_mass(rows, order)
    for rule in Rule:
        logits, weights, temperatures, union = union_case(torch.float32, rule)
        placed = place(([table[[0, 3]] for table in logits], weights[[0, 3]], temperatures[[0, 3]]))
        calls[f"mix_union {rule.value}"] = lambda placed=placed, rule=rule, union=union: triton.mix_union(
            *placed, rule, union, -20.0
        )
    laws, targets, weights, offsets = scored(5, 71)
    log_linear = place((laws, targets, weights, offsets))
    calls["score_log_linear"] = lambda: triton.score_log_linear(*log_linear)
    linear = place((laws[:, :, 0].exp().T.contiguous(), weights.abs(), offsets))
    calls["score_linear"] = lambda: triton.score_linear(*linear)
    return calls


NAMES = tuple(everything(lambda values: values))


def outputs(result: Any) -> list[Tensor]:
    return [tensor.cpu() for tensor in (result if isinstance(result, tuple) else (result,))]


class Guarded:
    """Memory between guard bands: floats of NaN, other types of a number that no input holds."""

    def __init__(self, device: str, band: int) -> None:
        self.device = device
        self.band = band
        self.bands: list[tuple[Tensor, Tensor]] = []

    def empty(self, shape: Any, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
        size = math.prod(shape)
        garbage: Any = math.nan if dtype.is_floating_point else dtype == torch.bool or 111
        buffer = torch.full((size + 2 * self.band,), garbage, dtype=dtype, device=self.device)
        for band in (buffer[: self.band], buffer[self.band + size :]):
            self.bands.append((band, band.clone()))
        return buffer[self.band : self.band + size].view(tuple(shape))

    def place(self, values: Any) -> Any:
        if isinstance(values, Tensor):
            return self.empty(values.shape, values.dtype).copy_(values)
        return type(values)(self.place(value) for value in values) if isinstance(values, list | tuple) else values

    def assert_untouched(self) -> None:
        for band, before in self.bands:
            assert bits(band.cpu()) == bits(before.cpu())


@cache
def undisturbed(name: str, device: str) -> list[bytes]:
    """Bits of the results in plain memory and natural order. Both laws that ask use the same sizes of tiles."""
    return [bits(result) for result in outputs(everything(lambda values: on(device, values))[name]())]


@pytest.mark.parametrize("name", NAMES)
def test_poisoned_memory_changes_nothing(device, blocks, monkeypatch, name):
    """Outputs begin as NaN and garbage, everything lies between guard bands, aligned to 16 bytes and not."""
    blocks(64)
    monkeypatch.setattr(shaping, "CAPACITY", 32)
    # Bands as wide as a tile, and before the plain run: what writes too far has to be found, not to break the process.
    # The interpreter does not know of alignment.
    for band in (64, 67) if device == "cuda" else (67,):
        guarded = Guarded(device, band)
        call = everything(guarded.place)[name]
        with monkeypatch.context() as patch:
            patch.setattr(launch, "empty", guarded.empty)
            results = outputs(call())
        guarded.assert_untouched()
        assert [bits(result) for result in results] == undisturbed(name, device)


def test_a_kernel_that_writes_too_far_is_found():
    """The guard bands above can fail."""
    guarded = Guarded("cpu", 4)
    own = guarded.place(torch.zeros(5))
    guarded.assert_untouched()
    torch.as_strided(own, (6,), (1,), own.storage_offset())[5] = 0.0
    with pytest.raises(AssertionError):
        guarded.assert_untouched()


@contextlib.contextmanager
def shuffled(device: str) -> Iterator[list[bool]]:
    """Run the programs of every grid in another order; yields, for every program that ran, whether it moved.

    On CUDA the hardware chooses the order, and no two runs need to have the same.
    """
    moved: list[bool] = []
    if device != "cpu":
        yield moved
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx

    def elsewhere(x: int, y: int, z: int) -> None:
        width, height, depth = builder.grid_dim
        index = (x * height + y) * depth + z
        size = width * height * depth
        place = int(torch.randperm(size, generator=torch.Generator().manual_seed(size))[index])
        moved.append(place != index)
        original(place // depth // height, place // depth % height, place % depth)

    builder.set_grid_idx = elsewhere
    try:
        yield moved
    finally:
        builder.set_grid_idx = original


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_programs_changes_no_bit(device, blocks, monkeypatch, name):
    blocks(64)
    monkeypatch.setattr(shaping, "CAPACITY", 32)
    call = everything(lambda values: on(device, values))[name]
    with shuffled(device) as moved:
        assert [bits(result) for result in outputs(call())] == undisturbed(name, device)
    assert device != "cpu" or any(moved)
