"""The laws of the Triton kernels on a GPU: the same ones that the interpreter is held to."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need the extra `triton`")

from tests.kernels.triton_inputs import blocks  # noqa: F401 - a fixture of the laws
from tests.kernels.triton_laws import *  # noqa: F403
from tests.kernels.triton_memory_laws import *  # noqa: F403
from tests.kernels.triton_range_laws import *  # noqa: F403

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the Triton kernels ran in the interpreter only"
)


@pytest.fixture
def device() -> str:
    return "cuda"
