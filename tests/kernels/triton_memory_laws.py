"""The Triton kernels and memory, as tests that take a `device` like those of `triton_laws.py`: no kernel writes too far
or reads what nobody wrote, in whatever order its programs run.
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

from tests.kernels.cases import random_case
from tests.kernels.triton_inputs import SETTINGS, bits, on, scored, tied_rows, union_case
from token_swarm.kernels import triton
from token_swarm.kernels.triton import launch, shaping
from token_swarm.particle import Rule

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
