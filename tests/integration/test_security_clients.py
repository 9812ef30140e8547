"""Commands, other programs and a search show their credentials to a coordinator that asks for TLS and a token."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from token_swarm_server.cli import app
from token_swarm_server.config.settings import ClientTls
from token_swarm_server.rpc.bearer_tokens import PREFIX, create_token
from typer.testing import CliRunner

from tests.integration.guarded_calls import REQUEST, text_of_one_process
from tests.integration.test_coordinator import coordinator
from token_swarm.v1 import swarm_pb2_grpc


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, pki, server) -> Iterator[tuple[str, str, Path]]:
    """A coordinator in a thread of its own that asks for a token over TLS: its address, a token, and a file with it."""
    folder = tmp_path_factory.mktemp("guarded")
    token = create_token(folder / "tokens.json", "alice")
    (folder / "token").write_text(f"{token}\n")
    addresses: list[str] = []
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        try:
            async with coordinator(folder, tls=server, tokens=str(folder / "tokens.json")) as running:
                addresses.append(running.address)
                ready.set()
                await stop.wait()
        finally:
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    assert addresses, "the coordinator did not start"
    yield addresses[0], token, folder / "token"
    loops[0].call_soon_threadsafe(stop.set)
    thread.join(30)


def run(*arguments: str, **environment: str | None):
    clean = {name: None for name in os.environ if name.startswith("TOKEN_SWARM_")}
    return CliRunner().invoke(app, arguments, env=clean | environment)


def test_commands_show_a_token_over_tls(guarded, pki):
    address, token, file = guarded
    ca = ("--tls-ca", str(pki.ca))
    text = ("--prompt", "cab", "--seed", "1", "--max-bytes", "12")
    result = run("generate", "--address", address, *text, *ca, "--token-file", str(file))
    assert (result.exit_code, result.stdout) == (0, text_of_one_process()), result.stderr
    # The same out of the environment.
    variables = {"TOKEN_SWARM_TOKEN": token, "TOKEN_SWARM_TLS_CA": str(pki.ca)}
    result = run("score", "--address", address, "--text", "abc", "--json", **variables)
    assert result.exit_code == 0, result.stderr
    variables = {"TOKEN_SWARM_TOKEN_FILE": str(file), "TOKEN_SWARM_TLS_CA": str(pki.ca)}
    assert run("particles", "--address", address, "--json", **variables).exit_code == 0
    assert run("health", "--address", address, *ca).exit_code == 0


def test_commands_say_what_is_wrong_with_credentials(guarded, pki, strangers, tmp_path):
    address, _, file = guarded
    ca = ("--tls-ca", str(pki.ca))
    (tmp_path / "wrong").write_text(PREFIX + "wrong")
    said = {
        ca: "a valid bearer token is needed",
        (*ca, "--token-file", str(tmp_path / "wrong")): "the one given is not",
        ("--token-file", str(file)): "the server wants TLS; give --tls-ca (or --tls)",
        ("--tls-ca", str(strangers.ca), "--token-file", str(file)): "not from an authority of --tls-ca",
        ("--tls", "--token-file", str(file)): "not from an authority of --tls-ca",
        (*ca, "--token-file", str(tmp_path / "none")): "--token-file: ",
        ("--tls-ca", str(file)): "--tls-ca: ",
    }
    for flags, message in said.items():
        result = run("particles", "--address", address, *flags)
        assert (result.exit_code, result.stdout) == (2, ""), flags
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert file.read_text().strip() not in result.stderr


def test_other_programs_show_a_token_as_the_docs_say(guarded, pki):
    address, token, _ = guarded
    tls = grpc.ssl_channel_credentials(pki.ca.read_bytes())
    credentials = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token))
    with grpc.secure_channel(address, credentials) as channel:
        stub: Any = swarm_pb2_grpc.SwarmServiceStub(channel)
        assert "".join(each.chunk.text for each in stub.Generate(REQUEST)) == text_of_one_process()


def test_a_search_shows_its_token_too(guarded, pki):
    from token_swarm_server.search.remote import RemoteEnsemble

    from token_swarm.search.utility import UtilityUnavailable

    address, token, _ = guarded
    tls = ClientTls(ca=pki.ca)
    with RemoteEnsemble(address, tls=tls, token=token) as remote:
        assert set(remote.keys()) == {"e0", "e1"}
    with RemoteEnsemble(address, tls=tls) as remote, pytest.raises(UtilityUnavailable, match="refuses: a valid bearer"):
        remote.keys()
