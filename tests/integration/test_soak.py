"""Two minutes of `python -m bench soak`, with models of a few kilobytes and real processes.

SOAK_MINUTES changes how long the requests last; the half-hour on the demo experts is run by hand.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.expert_server.server import ExpertServer
from token_swarm_server.rpc.errors import ExpertUnavailable

from tests.conftest import save_small_llama, save_tiny_model
from tests.laws.ensembles import NESTED
from token_swarm.experts.toy import ToyExpert

MINUTES = float(os.environ.get("SOAK_MINUTES", "1.5"))
ROOT = Path(__file__).parents[2]


def test_streams_survive_and_nothing_is_left_behind(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "llama")
    torch.manual_seed(1)
    # Another vocabulary, so that bytes are mixed.
    save_small_llama(tmp_path / "small", 285)
    flags = {
        "--models": f"llama={tmp_path}/llama,small={tmp_path}/small",
        "--minutes": str(MINUTES),
        "--warm": "15",
        "--kill-every": "15",
        "--max-context": "120",
        "--max-bytes": "60",
        "--prompts": "8",
        "--patience": "150",
        # In its first minute a process still takes memory for what it has not done before.
        "--memory-growth": "0.3",
    }
    words = [word for flag in flags.items() for word in flag]
    done = subprocess.run(
        [sys.executable, "-m", "bench.soak", "--json", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["exit code"] == 0
    assert found["kills"]
    assert found["greedy texts compared"] >= 8
    ended = found["requests"]
    # Every kind was sent, and no text was any other than undisturbed.
    assert {name.partition(":")[0] for name in ended} >= {"greedy", "cancel", "deadline", "wrong"}
    assert not any("different" in name or "broken" in name for name in ended)


class Held(ToyExpert):
    """Encodes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__("toy", NESTED)
        self.entered, self.let_go = threading.Event(), threading.Event()

    def encode(self, prompt: str, *, chat: bool = False) -> Any:
        self.entered.set()
        self.let_go.wait(20)
        return super().encode(prompt, chat=chat)


async def test_a_prompt_that_is_being_encoded_fails_when_the_connection_is_closed(tmp_path: Path) -> None:
    """Found by a soak: grpc cancels the call, and the client's stream got neither a status nor another message."""
    expert = Held()
    server = ExpertServer(expert, f"unix:{tmp_path}/run/socket")
    await server.start()
    connection = await ExpertConnection.connect(server.address, "toy", cache=tmp_path)
    encoding = asyncio.create_task(connection.encode("ab"))
    await asyncio.to_thread(expert.entered.wait, 20)
    await connection.close()
    with pytest.raises(ExpertUnavailable, match="the connection is closed"):
        await encoding
    expert.let_go.set()
    await server.stop()
