"""The laws of the Triton kernels on CPU tensors. Needs TRITON_INTERPRET=1 before Triton is first imported, which one
test of a long session cannot promise: `test_triton_interpreter.py` runs this file in a process of its own.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.triton_inputs import blocks  # noqa: F401 - a fixture of the laws
from tests.kernels.triton_laws import *  # noqa: F403
from tests.kernels.triton_memory_laws import *  # noqa: F403
from tests.kernels.triton_range_laws import *  # noqa: F403

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
torch.set_num_threads(1)

# The interpreter replaces Triton's language by its own at every call of a device function, which is half its time.
# Here nothing else runs: once is enough.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda _: interpreter._LangPatchScope()


@pytest.fixture
def device() -> str:
    return "cpu"
