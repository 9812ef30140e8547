"""Every number that a request may hold, with logits of every kind: each implementation keeps to the float64 reference.

The accuracy stated here is what the ranges of `token_swarm.ranges` were chosen by:

- `mix` of the linear rule or of one expert, and `softmax_masses`: relative 2e-5 (eager 1e-4) down to 1e-30.
- `mix` of several experts, log-linear rule: the same, and 2^-21 of the sum of |weight / temperature| times the spread
  of the expert's finite logits, while that sum of exponents is at most 8; beyond it the rows are mixed in float64.
- `shape`: relative 2e-5, and 2^-22 / temperature, of probabilities that are normal float32 numbers; temperatures at
  which smaller ones would count are given float64 (`Sampling.is_wide`).

Under weights of both signs a finite logit beyond 1e30, a model's own mask, may count as -inf.
A row is NaN where an expert's logits are bad or the experts leave no token, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cases import DTYPES
from token_swarm import ranges
from token_swarm.kernels import UnionMap, eager, native, reference
from token_swarm.particle import Rule
from token_swarm.vocabulary import Vocabulary

LEVELS = [None] if native.library() is None else [None, *native.LEVELS.values()]
RELATIVE = {eager: 1e-4, native: 2e-5}


@pytest.fixture(params=LEVELS, ids=lambda level: "eager" if level is None else level)
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Torch eager, and C++ at each instruction set that this processor has."""
    if request.param is None:
        yield eager
        return
    if native.instruction_set(request.param) != request.param:
        native.instruction_set(list(native.LEVELS.values())[-1])
        pytest.skip("this processor has no such instructions")
    yield native
    native.instruction_set(list(native.LEVELS.values())[-1])


def drawn(examples: int) -> Callable[[Any], Any]:
    # The fixture only chooses which implementation an example is given to.
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def powers_of_ten(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log10(low), math.log10(high)).map(lambda power: min(max(10**power, low), high))


temperatures = powers_of_ten(ranges.EXPERT_TEMPERATURE.low, ranges.EXPERT_TEMPERATURE.high) | st.sampled_from(
    [ranges.EXPERT_TEMPERATURE.low, 1.0, ranges.EXPERT_TEMPERATURE.high]
)
sizes = powers_of_ten(1e-3, ranges.WEIGHT.high) | st.sampled_from([5e-324, 1e-300, 1e-12, 1.0, 2.0, ranges.WEIGHT.high])
weights = st.builds(lambda size, sign: size * sign, sizes, st.sampled_from([1.0, 1.0, -1.0]))


@st.composite
def logit_rows(draw: st.DrawFn) -> Tensor:
    """One row [width]: of any scale and offset, equal, with ties, with minus infinity, with a model's own masks."""
    width = draw(st.sampled_from([1, 3, 17, 300, 5000]))
    dtype = draw(st.sampled_from(DTYPES))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 5.0, 30.0, 1000.0, 1e4]))
    row = torch.randn(width, generator=random) * scale + draw(st.sampled_from([0.0, 0.0, -30.0, 1000.0, 2e4]))
    if draw(st.booleans()):
        row = row.round()  # ties
    few = torch.rand(width, generator=random) < 0.2
    row[few] = draw(st.sampled_from([0.0, -math.inf, -3e38 if dtype != torch.float16 else -65504.0, 40.0]))
    return row.clamp(-65504, 65504).where(row.isfinite() & (row.abs() < 1e30), row).to(dtype)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits of one to four experts [1, width] each, weights and temperatures [1, experts]."""
    rows = draw(st.lists(logit_rows(), min_size=1, max_size=4))
    width = min(row.numel() for row in rows)
    count = len(rows)
    own = draw(st.lists(weights, min_size=count, max_size=count))
    heats = draw(st.lists(temperatures, min_size=count, max_size=count))
    return [row[None, :width] for row in rows], torch.tensor([own]).double(), torch.tensor([heats]).double()


def assert_as_the_reference(ours: Tensor, theirs: Tensor, relative: float) -> None:
    assert bool((ours.isnan() == theirs.isnan()).all()), (ours, theirs)
    good = ~theirs.isnan()
    difference = (ours.double() - theirs)[good].abs()
    assert bool((difference <= relative * theirs[good] + 1e-30).all()), float(
        (difference / (theirs[good] + 1e-30)).max()
    )


def rounding(logits: list[Tensor], own: Tensor, heats: Tensor) -> float:
    """What float32 exponents of several experts may lose beside the relative error that is always allowed."""
    exponents = (own / heats).abs()[0]
    if len(logits) == 1 or float(exponents.sum()) > 8:
        return 0.0
    # Beside minus infinity and a model's own masks.
    finite = [table[table.abs() < 1e30].double() for table in logits]
    spread = [float(row.amax() - row.amin()) if row.numel() else 0.0 for row in finite]
    return float(2**-21 * (exponents * torch.tensor(spread).double()).sum())


HUGE = [torch.tensor([[0.0, 10.0, 9.999, -40.0]]), torch.tensor([[5.0, 1.0, 1.0, 2.0]])]
ONES = torch.ones(1, 2, dtype=torch.float64)
MASKED = [torch.tensor([[0.0, 1.0, -3.4e38]]), torch.tensor([[1.0, 0.0, 2.0]])]


@drawn(400)
@example((HUGE, ONES * ranges.WEIGHT.high, ONES * ranges.EXPERT_TEMPERATURE.low))
@example((HUGE, ONES * torch.tensor([[1000.0, -1000.0]]).double(), ONES))
@example(([HUGE[0]], ONES[:, :1] * -1000, ONES[:, :1]))
@example((MASKED, ONES * torch.tensor([[-2.0, 1.0]]).double(), ONES))
@example((MASKED, ONES * 1e-300, ONES))
@given(mixtures())
def test_log_linear(kernels: ModuleType, mixture: tuple[list[Tensor], Tensor, Tensor]) -> None:
    logits, own, heats = mixture
    allowed = torch.ones(logits[0].shape[1], dtype=torch.bool)
    arguments = (logits, own, heats, Rule.LOG_LINEAR, allowed)
    relative = RELATIVE[kernels] + rounding(*mixture)
    theirs = reference.mix(*arguments)
    if len(logits) > 1 and bool((own < 0).any()):
        # Masks of several experts may cancel or stay masked: what is beyond float32 is not told from what is excluded.
        assert bool((kernels.mix(*arguments).isnan() == theirs.isnan()).all())
        logits = [torch.where(table < -1e30, -math.inf, table.float()).to(table.dtype) for table in logits]
        arguments = (logits, own, heats, Rule.LOG_LINEAR, allowed)
        theirs = reference.mix(*arguments)
    assert_as_the_reference(kernels.mix(*arguments), theirs, relative)


@drawn(300)
@example((HUGE, ONES * ranges.WEIGHT.high, ONES * ranges.EXPERT_TEMPERATURE.low))
@example((MASKED, ONES * torch.tensor([[1e-300, 5e-324]]).double(), ONES * ranges.EXPERT_TEMPERATURE.high))
@given(mixtures())
def test_linear(kernels: ModuleType, mixture: tuple[list[Tensor], Tensor, Tensor]) -> None:
    logits, own, heats = mixture
    allowed = torch.ones(logits[0].shape[1], dtype=torch.bool)
    arguments = (logits, own.abs(), heats, Rule.LINEAR, allowed)
    assert_as_the_reference(kernels.mix(*arguments), reference.mix(*arguments), RELATIVE[kernels])


@drawn(200)
@given(logit_rows(), temperatures, sizes, st.booleans())
def test_masses_of_one_expert(kernels: ModuleType, row: Tensor, heat: float, weight: float, shuffled: bool) -> None:
    """A lone expert is not mixed: its masses are made at its temperature over its weight."""
    order = torch.randperm(row.numel(), generator=torch.Generator().manual_seed(1)).int() if shuffled else row.numel()
    arguments = (row[None], torch.tensor([heat / weight]).double(), order, row.numel())
    (ours, sums), (theirs, exact) = kernels.softmax_masses(*arguments), reference.softmax_masses(*arguments)
    assert_as_the_reference(ours, theirs, RELATIVE[kernels])
    assert torch.allclose(sums, exact, rtol=RELATIVE[kernels], atol=1e-30, equal_nan=True)


@drawn(150)
@given(mixtures(), st.sampled_from(list(Rule)))
def test_union(kernels: ModuleType, mixture: tuple[list[Tensor], Tensor, Tensor], rule: Rule) -> None:
    logits, own, heats = mixture
    width = min(logits[0].shape[1], 200)
    logits = [table[:, :width] for table in logits]
    texts = [
        tuple(b"t%d" % (token + 3 * expert) for token in range(width)) for expert in range(len(logits))
    ]
    union = UnionMap.build([Vocabulary(text, ()) for text in texts])
    arguments = (logits, own.abs() if rule is Rule.LINEAR else own, heats, rule, union, -23.0)
    exponents = float((own / heats).abs().sum())
    # Log-probabilities above the floor are at most 23 nats and their float32 is right to 2^-20 of that.
    relative = RELATIVE[kernels] + (2**-20 * 23 * exponents if rule is Rule.LOG_LINEAR and exponents <= 8 else 0)
    assert_as_the_reference(kernels.mix_union(*arguments), reference.mix_union(*arguments), relative)


@drawn(300)
@example(torch.tensor([0.0, 1.0, 1.0]), ranges.GREEDY_BELOW, 0, 1.0, 0.0)
@example(torch.tensor([0.0, 1e-4, -1e-4]), ranges.GREEDY_BELOW, 0, 1.0, 0.0)
@given(
    logit_rows(),
    powers_of_ten(ranges.GREEDY_BELOW, ranges.TEMPERATURE.high),
    st.just(0) | st.integers(1, 400) | st.just(int(ranges.TOP_K.high)),
    st.just(1.0),
    st.just(0.0) | st.floats(0, 1),
)
def test_shape(kernels: ModuleType, row: Tensor, heat: float, top_k: int, top_p: float, min_p: float) -> None:
    probabilities = torch.softmax(row.float(), 0)[None]
    probabilities[probabilities < 1.2e-38] = 0.0
    columns = (torch.tensor([heat]).double(), torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    ours, theirs = kernels.shape(probabilities, *columns), reference.shape(probabilities, *columns)
    relative = RELATIVE[kernels] + 2**-22 / heat
    # A filter's threshold may fall between two tokens that rounding makes equal: those it moves are few and told apart.
    differ = (ours > 0) != (theirs > 1e-37)
    if bool(differ.any()) and (top_k or min_p):
        scaled = (probabilities.double() / probabilities.max()).pow(1 / heat)[differ]
        kept = (probabilities.double() / probabilities.max()).pow(1 / heat)[theirs > 0].min()
        near = ((scaled - kept).abs() <= 4 * relative * kept) | ((scaled - min_p).abs() <= 4 * relative * scaled)
        assert bool((near | (scaled < 1e-37)).all())
        return
    assert_as_the_reference(ours, theirs, relative)


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-9, 0.5, 1 - 1e-16, 1.0])
def test_top_p_keeps_a_token_whatever_it_is(kernels: ModuleType, top_p: float) -> None:
    probabilities = torch.softmax(torch.arange(50.0) / 7, 0)[None]
    columns = (torch.ones(1).double(), torch.zeros(1).long(), torch.tensor([top_p]).double(), torch.zeros(1).double())
    ours, theirs = kernels.shape(probabilities, *columns), reference.shape(probabilities, *columns)
    assert bool(((ours > 0) == (theirs > 0)).all())
    assert_as_the_reference(ours, theirs, 1e-4)


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_only_bad_logits_make_a_row_nan(kernels: ModuleType, rule: Rule, wrong: float) -> None:
    """Beside rows of the most extreme values that are accepted, which are not."""
    logits = [torch.tensor([[1.0, -3.4e38, 2.0], [1.0, wrong, 2.0]]), torch.tensor([[3.0, 1.0, 3.4e38]] * 2)]
    own, heats = torch.tensor([[1000.0, 1000.0]] * 2).double(), torch.tensor([[0.05, 0.05]] * 2).double()
    mixed = kernels.mix(logits, own, heats, rule, torch.ones(3, dtype=torch.bool))
    assert mixed.isnan().all(1).tolist() == [False, True]
