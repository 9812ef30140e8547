"""What a command, or a coordinator, says of an address where something else answers, or nothing."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, start_http_server
from rich.console import Console
from token_swarm_server.cli import app
from token_swarm_server.config.loading import load_settings
from token_swarm_server.launch import launcher
from token_swarm_server.launch.launcher import LaunchError, launch
from token_swarm_server.rpc.diagnosis import COORDINATOR, EXPERT, find
from token_swarm_server.telemetry.counts import Counts
from token_swarm_server.telemetry.metrics import SwarmCollector
from typer.testing import CliRunner

COMMANDS = {
    "generate": ["generate", "--prompt", "x"],
    "score": ["score", "--text", "x"],
    "particles": ["particles"],
    "top": ["top", "--once"],
    "bench": ["bench", "latency"],
}


@contextmanager
def grpc_server(*services: str, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """A server whose health knows `services`, and that has no other method."""
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    for service in ("", *services):
        servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def expert() -> Iterator[str]:
    with grpc_server(EXPERT) as address:
        yield address


@pytest.fixture(scope="module")
def metrics() -> Iterator[str]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SwarmCollector(Counts(["a"]), lambda: {}))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def encrypted(server) -> Iterator[str]:
    pair = tuple(open(server[name], "rb").read() for name in ("key", "certificate"))  # noqa: PTH123, SIM115
    with grpc_server(COORDINATOR, credentials=grpc.ssl_server_credentials([pair])) as address:
        yield address


@pytest.fixture
def closed() -> str:
    """A port where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def refused(*arguments: str) -> tuple[str, int]:
    result = CliRunner().invoke(app, arguments)
    assert result.stderr.startswith("error: "), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr.strip(), result.exit_code


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
@pytest.mark.parametrize(
    ("where", "said", "code"),
    [
        ("expert", "this is an expert of Token Swarm, not a coordinator", 2),
        ("metrics", "this is the metrics port of Token Swarm; give its gRPC address, such as 127.0.0.1:50061", 2),
        ("web", "this is an HTTP server (the metrics port?); give the gRPC address", 2),
        ("encrypted", "the server wants TLS; give --tls-ca (or --tls)", 2),
        ("closed", "nothing listens there; start one with `token-swarm serve", 1),
    ],
)
def test_every_command_says_what_it_found(request, command, where, said, code):
    address = request.getfixturevalue(where)
    line, exit_code = refused(*command, "--address", address)
    assert f"{address}: {said}" in line
    assert exit_code == code


def test_tls_at_a_server_without(expert):
    line, code = refused("generate", "--prompt", "x", "--tls", "--address", expert)
    assert f"{expert}: the server does not speak TLS" in line
    assert code == 2


def test_sockets_that_are_none(tmp_path):
    line, code = refused("particles", "--address", f"unix:{tmp_path}/none")
    assert f"there is no socket {tmp_path}/none" in line
    assert code == 1
    (tmp_path / "file").write_text("")
    line, code = refused("particles", "--address", f"unix:{tmp_path}/file")
    assert f"{tmp_path}/file is not a socket" in line
    assert code == 2
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))
    line, code = refused("particles", "--address", f"unix:{tmp_path}/left")
    assert f"nothing listens at {tmp_path}/left any more" in line
    assert code == 1


WRITTEN_WRONG = {
    "http://127.0.0.1:50061": "it is gRPC, not http: write 127.0.0.1:50061",
    "127.0.0.1": "host and port are both needed: 127.0.0.1:50061",
    "50071": "host and port are both needed: 127.0.0.1:50071",
    "::1": "host and port are both needed: [::1]:50061",
    "localhost:99999": "the port is a number from 1 to 65535",
    "localhost:": "the port is a number from 1 to 65535",
    ":50061": "must be host:port",
    "unix:": "must be host:port",
    "local host:1": "must be host:port",
}


@pytest.mark.parametrize("command", [*COMMANDS.values(), ["health"]], ids=[*COMMANDS, "health"])
@pytest.mark.parametrize(("address", "said"), WRITTEN_WRONG.items())
def test_an_address_that_is_none_is_refused_before_anything_is_done(command, address, said):
    line, code = refused(*command, "--address", address)
    assert line.startswith(f"error: --address: '{address}' is not allowed; it must be host:port, such as ")
    assert said in line
    assert code == 2


def test_health_gives_the_reason(metrics, closed, expert):
    line, code = refused("health", "--address", metrics)
    assert "NO_ANSWER (this is the metrics port of Token Swarm" in line
    assert code == 1
    answer = json.loads(CliRunner().invoke(app, ["health", "--json", "--address", closed]).stdout)
    assert (answer["status"], answer["reason"]) == ("NO_ANSWER", "nothing listens there")
    assert CliRunner().invoke(app, ["health", "--address", expert]).exit_code == 0


async def test_a_name_that_nobody_knows():
    assert "the name 'nowhere.invalid' is not known" in await find("nowhere.invalid:1", wanted=EXPERT, tls=False)
    assert await find("dns:///nowhere.invalid:1", wanted=EXPERT, tls=False) == ""


async def test_a_server_that_says_nothing_and_one_of_somebody_else(closed):
    with grpc_server("helloworld.Greeter") as address:
        said = await find(address, wanted=EXPERT, tls=False)
    assert said == "this is a gRPC server, but not an expert of Token Swarm"
    host, _, port = closed.partition(":")
    with socket.create_server((host, int(port))):
        assert "does not speak gRPC" in await find(closed, wanted=COORDINATOR, tls=False)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("coordinator", "this is a coordinator of Token Swarm, not an expert"),
        ("metrics", "this is the metrics port of Token Swarm; give its gRPC address, such as 127.0.0.1:50071"),
        ("encrypted", "the server wants TLS; give the expert's key tls"),
        ("closed", "nothing listens there"),
    ],
)
async def test_an_experts_address_that_is_wrong_is_named(request, monkeypatch, tmp_path, where, said):
    monkeypatch.setattr(launcher, "CONNECT_SECONDS", 0.5)
    with grpc_server(COORDINATOR) as coordinator:
        address = coordinator if where == "coordinator" else request.getfixturevalue(where)
        (tmp_path / "c.yaml").write_text(f"experts: {{a: {{address: '{address}'}}}}\ncache: {tmp_path}\n")
        with pytest.raises(LaunchError) as caught:
            async with launch(load_settings(tmp_path / "c.yaml"), {}, console=Console(quiet=True)):
                pass
    assert str(caught.value).startswith("experts.a.address: ")
    assert address in str(caught.value)
    assert said in str(caught.value)
