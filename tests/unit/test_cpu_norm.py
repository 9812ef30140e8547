"""RMS norms of models are replaced where they are what the kernel computes, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from token_swarm.experts.transformers.cpu_norm import CpuRmsNorm, pack_norms
from token_swarm.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C++ kernels were not built")


class CappedRMSNorm(LlamaRMSNorm):
    """Computes something else."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).clamp(-2, 2)


class BiasedRMSNorm(LlamaRMSNorm):
    """Has a parameter more."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))


@pytest.mark.parametrize("width", [1, 7, 64, 100, 256, 640])
def test_the_kernel_equals_the_definition(width: int) -> None:
    gain = torch.randn(width)
    for shape in ((width,), (0, width), (3, width), (1, 5, 2, width)):
        for size in (1e-4, 1.0, 1e3):
            hidden = size * torch.randn(shape)
            expected = F.rms_norm(hidden, (width,), gain, 1e-6)
            torch.testing.assert_close(native.rms_norm(hidden, gain, 1e-6), expected, rtol=2e-6, atol=1e-6)


def test_rows_with_gaps_are_read_over() -> None:
    hidden, gain = torch.randn(1, 4, 5, 16).transpose(1, 2), torch.ones(16)
    torch.testing.assert_close(native.rms_norm(hidden, gain, 1e-6), F.rms_norm(hidden, (16,), gain, 1e-6))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_norms_of_models_are_replaced(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(48), nn.LayerNorm(48))
    nn.init.normal_(model[0].weight)
    hidden = torch.randn(2, 3, 48)
    with torch.inference_mode():
        expected = model(hidden)
        pack_norms(model)
        torch.testing.assert_close(model(hidden), expected)
    assert isinstance(model[0], CpuRmsNorm)
    assert isinstance(model[1], nn.LayerNorm)


@pytest.mark.parametrize("norm", [CappedRMSNorm(48), BiasedRMSNorm(48), LlamaRMSNorm(48).bfloat16()])
def test_others_stay(norm: nn.Module) -> None:
    model = nn.Sequential(norm)
    pack_norms(model)
    assert model[0] is norm
