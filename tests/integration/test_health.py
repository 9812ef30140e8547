"""`token-swarm health` against real servers: what a probe is told, and with which exit code."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from token_swarm_server.expert_server.server import SERVICE, ExpertServer

from tests.laws.ensembles import NESTED
from token_swarm.experts.toy import ToyExpert


async def health(address: str, *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON object and standard error of one call."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "token_swarm_server.cli", "health", "--address", address, "--json", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(out), err.decode()


async def test_a_probe_is_told_whether_an_expert_serves(tmp_path: Path) -> None:
    server = ExpertServer(ToyExpert("toy", NESTED), f"unix:{tmp_path}/run/expert.sock")
    # Asked before it listens: --wait finds it as soon as it does.
    waiting = asyncio.create_task(health(server.address, "--wait", "60"))
    nobody = await health(server.address)
    assert nobody[0] == 1
    assert nobody[1]["status"] == "NO_ANSWER"
    assert nobody[1]["reason"]
    await server.start()
    found = await waiting
    assert found == (
        0,
        {"address": server.address, "service": "", "status": "SERVING", "reason": "", "healthy": True},
        "",
    )
    own, other, alive = await asyncio.gather(
        health(server.address, "--service", SERVICE),
        health(server.address, "--service", "no.such.Service"),
        health(server.address, "--service", "no.such.Service", "--alive"),
    )
    assert (own[0], own[1]["service"], own[1]["status"]) == (0, SERVICE, "SERVING")
    assert (other[0], other[1]["status"], other[1]["healthy"]) == (1, "SERVICE_UNKNOWN", False)
    assert (alive[0], alive[1]["healthy"]) == (0, True)
    # As while it drains: not ready, but alive.
    await server._host.set_serving(False)
    ready, alive = await asyncio.gather(health(server.address), health(server.address, "--alive"))
    assert (ready[0], ready[1]["status"]) == (1, "NOT_SERVING")
    assert alive[0] == 0
    await server.stop()
