"""`token-swarm score`: what is shown of windows, and what is found before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from token_swarm_server.cli import app, session
from typer.testing import CliRunner

from token_swarm.particle import Mixture, Particle
from token_swarm.v1 import swarm_pb2

RESPONSE = swarm_pb2.ScoreResponse(
    bytes=15000,
    log_prob=-10000.0,
    experts=[swarm_pb2.ExpertScore(expert="a", log_prob=-11000.0, tokens=4000, token_log_prob=-11500.0)],
    stride=4000,
    windows=[
        swarm_pb2.ScoreWindow(start=0, bytes=8000),
        swarm_pb2.ScoreWindow(start=8000, bytes=4000, context_bytes=4100),
        swarm_pb2.ScoreWindow(start=12000, bytes=3000, context_bytes=5200),
    ],
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[swarm_pb2.ScoreRequest]:
    """The requests that a server which answers RESPONSE was sent."""
    seen: list[swarm_pb2.ScoreRequest] = []

    class Stub:
        async def Score(self, request: swarm_pb2.ScoreRequest) -> swarm_pb2.ScoreResponse:  # noqa: N802
            seen.append(request)
            return RESPONSE

    def with_server(address: Any, config: Any, call: Callable[[Any], Any], credentials: Any) -> Any:
        return session.run(call(Stub()))

    monkeypatch.setattr(session, "with_server", with_server)
    return seen


def test_windows_and_stride_are_shown(asked: list[swarm_pb2.ScoreRequest]) -> None:
    result = CliRunner().invoke(app, ["score", "--text", "x", "--stride", "4000"])
    assert result.exit_code == 0, result.output
    assert asked[0].stride == 4000
    said = " ".join(result.stdout.split())
    for words in ("15,000 bytes in 3 windows", "first of 8,000", "stride of 4,000", "at least 4,100 bytes"):
        assert words in said
    document = json.loads(CliRunner().invoke(app, ["score", "--text", "x", "--json"]).stdout)
    assert not asked[1].HasField("stride")
    assert document["stride"] == 4000
    assert document["windows"][1] == {"start": 8000, "bytes": 4000, "context_bytes": 4100}
    assert CliRunner().invoke(app, ["score", "--text", "x", "--stride", "0"]).exit_code == 2


BAD = {
    "particle": (["--particle", "none"], "there is no particle named 'none'; known: good"),
    "expert": (["--weights", "a=1,z=2"], "there is no expert named 'z'"),
    "expert of a particle": (["--particle", "strange"], "there is no expert named 'z'"),
    "broken": (["--particle", "good"], "bad.json"),
}


@pytest.mark.parametrize(("more", "said"), BAD.values(), ids=BAD)
def test_a_mixture_is_looked_at_before_an_expert_is_loaded(tmp_path: Path, more: list[str], said: str) -> None:
    """The model does not exist, which would be said instead."""
    store = tmp_path / "particles"
    Particle("good", Mixture({"a": 1.0})).save(store / "good.json")
    if "strange" in more:
        Particle("strange", Mixture({"z": 1.0})).save(store / "strange.json")
    if said == "bad.json":
        (store / "bad.json").write_text("{")
    config = tmp_path / "c.yaml"
    config.write_text("experts: {a: {model: /no/model}}\ncoordinator: {particles: particles}\n")
    result = CliRunner().invoke(app, ["score", "--text", "x", "--config", str(config), *more])
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "/no/model" not in result.stderr
