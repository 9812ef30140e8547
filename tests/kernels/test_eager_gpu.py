"""Torch eager on a GPU, where float64 rows go, and all rows without Triton: the same as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the inputs are those of the GPU kernels, which need the extra `triton`")

from tests.kernels.cases import random_case
from tests.kernels.triton_inputs import on, scored, three_vocabularies
from token_swarm.kernels import eager
from token_swarm.particle import Rule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch eager ran on the CPU only")


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every kernel with arguments of float64."""
    case = random_case("double", rows=3, width=70, experts=3, dtype=torch.float64, seed=3)
    nobody = torch.zeros_like(case.weights)
    logits = list(case.logits)
    rows = torch.softmax(3 * logits[0], -1)
    shaping = [torch.tensor([1.0, 0.7, 1.3]), torch.tensor([0, 9, 0]), torch.tensor([1.0, 0.9, 0.5]), torch.zeros(3)]
    laws, targets, weights, offsets = scored(5, 71)
    mixing = {
        f"{name} {rule.value}": call
        for rule in Rule
        for name, call in {
            "mix": (eager.mix, (logits, case.weights, case.temperatures, rule, case.allowed)),
            "mix of nobody": (eager.mix, (logits, nobody, case.temperatures, rule, case.allowed)),
            "union": (
                eager.mix_union,
                (logits, case.weights, case.temperatures, rule, three_vocabularies(), -20.0),
            ),
        }.items()
    }
    return {
        **mixing,
        "shape": (eager.shape, (rows, *shaping)),
        "choose": (eager.choose, (rows, torch.tensor([0.1, 0.9, 0.5]), torch.tensor([False, False, True]))),
        "prefix_mass": (eager.prefix_mass, (rows, torch.randperm(70, generator=torch.Generator().manual_seed(1)))),
        "softmax_masses": (eager.softmax_masses, (logits[0], torch.ones(3), torch.arange(9, 70), 55)),
        "score_linear": (eager.score_linear, (laws[:, :, 0].exp().T.double(), weights.abs(), offsets)),
        "score_log_linear": (eager.score_log_linear, (laws.double(), targets, weights, offsets)),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_eager_runs_on_a_gpu(name: str) -> None:
    function, arguments = calls()[name]
    expected, ours = function(*arguments), function(*on("cuda", arguments))
    for theirs, own in zip(
        *(result if isinstance(result, tuple) else (result,) for result in (expected, ours)), strict=True
    ):
        assert isinstance(own, Tensor)
        assert own.device.type == "cuda"
        torch.testing.assert_close(own.cpu(), theirs, rtol=1e-9, atol=1e-12, equal_nan=True)
