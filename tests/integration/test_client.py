"""The client package: against a real server, beside the server's own package, and in an environment without it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
from token_swarm_client import Client, FieldViolation, SwarmError, Tls
from token_swarm_server.rpc.bearer_tokens import create_token

from tests.integration.test_coordinator import coordinator, nothing_held
from token_swarm.particle import Mixture, Particle, Rule
from token_swarm.v1 import swarm_pb2

ROOT = Path(__file__).parents[2]
GENERATED = ("swarm_pb2.py", "swarm_pb2.pyi", "swarm_pb2_grpc.py", "swarm_pb2_grpc.pyi")
WEIGHTS = {"e0": 0.4, "e1": 0.6}


@pytest.mark.parametrize("name", GENERATED)
def test_the_generated_code_is_the_servers(name: str) -> None:
    own = (ROOT / "clients/python/token_swarm_client/_v1" / name).read_text()
    servers = (ROOT / "token_swarm/v1" / name).read_text()
    moved = re.sub(r"^from token_swarm\.v1 import", "from token_swarm_client._v1 import", servers, flags=re.MULTILINE)
    assert own == moved.replace("'token_swarm.v1.swarm_pb2'", "'token_swarm_client._v1.swarm_pb2'")


def test_its_version_and_licence_are_the_servers() -> None:
    def version(path: Path) -> str:
        (found,) = re.findall(r'^version = "(.*)"$', path.read_text(), re.MULTILINE)
        return str(found)

    assert version(ROOT / "clients/python/pyproject.toml") == version(ROOT / "pyproject.toml")
    assert (ROOT / "clients/python/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


async def test_blocking_calls(tmp_path: Path) -> None:
    folder = tmp_path / "particles"
    folder.mkdir()
    (folder / "best.json").write_text(Particle("best", Mixture(WEIGHTS, Rule.LINEAR)).to_json())

    def calls(address: str) -> None:
        with Client(address, timeout=60) as client:
            stream = client.generate("cab", weights=WEIGHTS, rule="linear", temperature=0.9, seed=3, max_bytes=40)
            with pytest.raises(RuntimeError, match="has not ended"):
                _ = stream.finish
            pieces = list(stream)
            assert len(pieces) > 1
            assert all(pieces)
            assert stream.finish.bytes == len("".join(pieces).encode())
            assert stream.finish.seed == 3
            assert {each.expert for each in stream.finish.experts} == set(WEIGHTS)
            again = client.generate("cab", particle="best", temperature=0.9, seed=3, max_bytes=40)
            assert again.text() == "".join(pieces)
            ended = client.generate("cab", weights=WEIGHTS, seed=3, max_bytes=200, stop="a")
            assert "a" not in ended.text()
            scored = client.score("abba", prompt="c", weights=WEIGHTS, per_byte=True)
            assert scored.bytes == len(scored.byte_log_probs) == 4
            assert sum(scored.byte_log_probs) == pytest.approx(scored.log_prob)
            assert [each.name for each in client.experts()] == ["e0", "e1"]
            (particle,) = client.particles()
            assert particle.name == "best"
            assert {each.expert: each.weight for each in particle.mixture.weights} == WEIGHTS

    async with coordinator(tmp_path, particles=str(folder)) as running:
        await asyncio.to_thread(calls, running.address)


async def test_asyncio_calls_and_leaving_early(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running, Client(running.address, timeout=60) as client:
        whole = client.agenerate("cab", weights=WEIGHTS, seed=1, max_bytes=60)
        text = "".join([piece async for piece in whole])
        assert whole.finish.bytes == len(text.encode())
        assert await client.agenerate("cab", weights=WEIGHTS, seed=1, max_bytes=60).text() == text
        async with client.agenerate("cab", weights=WEIGHTS, seed=1, max_bytes=100_000) as stream:
            assert text.startswith(await anext(stream))
        await nothing_held(running)
        with pytest.raises(SwarmError) as caught:
            await client.agenerate("cab", weights={"nobody": 1.0}).text()
        assert caught.value.code == "NOT_FOUND"


async def test_a_closed_stream_frees_what_the_server_held(tmp_path: Path) -> None:
    def begin(address: str) -> None:
        with Client(address) as client, client.generate("cab", seed=1, max_bytes=100_000) as stream:
            assert next(stream)

    async with coordinator(tmp_path) as running:
        await asyncio.to_thread(begin, running.address)
        await nothing_held(running)


async def test_errors_carry_the_code_the_fields_and_the_delay(tmp_path: Path) -> None:
    def calls(address: str) -> None:
        with Client(address, timeout=60) as client:
            with pytest.raises(SwarmError) as caught:
                client.generate("cab", top_p=1.5).text()
            assert caught.value.code == "INVALID_ARGUMENT"
            (violation,) = caught.value.violations
            assert isinstance(violation, FieldViolation)
            assert violation.field == "top_p"
            assert "1.5" in violation.description
            assert caught.value.retry_delay is None
            with pytest.raises(SwarmError) as caught:
                client.score("abba", particle="nobody")
            assert caught.value.code == "NOT_FOUND"
            with pytest.raises(SwarmError) as caught:
                client.generate("cab", seed=0, max_bytes=100_000, timeout=1e-4).text()
            assert caught.value.code == "DEADLINE_EXCEEDED"

    async with coordinator(tmp_path) as running:
        await asyncio.to_thread(calls, running.address)
        address = running.address
    with Client(address, timeout=5) as client, pytest.raises(SwarmError) as caught:
        client.experts()
    assert caught.value.code == "UNAVAILABLE"


async def test_a_server_without_its_experts_says_when_to_ask_again(tmp_path: Path) -> None:
    def call(address: str) -> SwarmError:
        with Client(address, timeout=10) as client, pytest.raises(SwarmError) as caught:
            client.generate("cab", seed=1, on_expert_failure="fail").text()
        return caught.value

    async with coordinator(tmp_path) as running:
        for server in running.servers.values():
            await server.stop()
        error = await asyncio.to_thread(call, running.address)
        assert error.code == "UNAVAILABLE"
        assert error.retry_delay is not None
        assert error.retry_delay > 0


async def test_tokens_and_tls(tmp_path, pki, server, tokens) -> None:
    token = create_token(tokens, "alice")

    def calls(address: str) -> None:
        tls = Tls(ca=pki.ca)
        with Client(address, tls=tls, timeout=60) as client, pytest.raises(SwarmError) as caught:
            client.experts()
        assert caught.value.code == "UNAUTHENTICATED"
        with Client(address, token=token, tls=tls, timeout=60) as client:
            assert len(client.experts()) == 2
            assert client.generate("cab", seed=1, max_bytes=20).text()

    async with coordinator(tmp_path, tls=server, tokens=str(tokens)) as running:
        await asyncio.to_thread(calls, running.address)
        async with Client(running.address, token=token, tls=Tls(ca=pki.ca), timeout=60) as client:
            assert await client.agenerate("cab", seed=1, max_bytes=20).text()


def test_a_token_does_not_travel_unencrypted() -> None:
    with pytest.raises(ValueError, match=r"^token: it would travel to swarm\.example:50061 unencrypted; give tls"):
        Client("swarm.example:50061", token="x")
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/swarm.sock"):
        Client(address, token="x").close()
    with pytest.raises(ValueError, match=r"^tls\.key: None is not allowed"):
        Client("swarm.example:50061", tls=Tls(certificate="client.pem"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "word"}, "unit: 'word' is not allowed; it must be one of auto, token, byte, union"),
        ({"rule": "mean", "weights": {"a": 1}}, "rule: 'mean' is not allowed; it must be one of linear, log_linear"),
        ({"rule": "linear"}, "rule: only together with weights"),
        ({"particle": "a", "weights": {"a": 1}}, "particle: it brings its own weights"),
        ({"weights": {"a": 1}, "expert_temperatures": {"b": 1}}, "expert_temperatures: 'b' has no weight"),
        ({"top_q": 1}, "there is no option 'top_q'"),
    ],
)
def test_options_that_no_request_can_hold_are_refused(options: dict[str, object], message: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        client.generate("cab", **options)  # type: ignore[arg-type]


def test_every_field_of_a_request_has_an_option() -> None:
    from token_swarm_client.requests import GenerateOptions

    fields = {field.name for field in swarm_pb2.GenerateRequest.DESCRIPTOR.fields} - {"prompt", "mixture", "sampling"}
    fields |= {field.name for field in swarm_pb2.Sampling.DESCRIPTOR.fields}
    assert set(GenerateOptions.__annotations__) == fields | {"weights", "rule", "expert_temperatures"}


def run(script: str) -> subprocess.CompletedProcess[str]:
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'clients/python')!r}]\n"
    return subprocess.run([sys.executable, "-c", paths + script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("first", ["token_swarm.v1", "token_swarm_client._v1"])
def test_it_stands_beside_the_servers_package_in_one_process(first: str) -> None:
    done = run(
        f"import {first}.swarm_pb2\n"
        "from token_swarm.v1 import swarm_pb2 as servers, swarm_pb2_grpc\n"
        "from token_swarm_client._v1 import swarm_pb2 as own, swarm_pb2_grpc\n"
        "assert own.Finish(bytes=3) == servers.Finish(bytes=3)\n"
    )
    assert done.returncode == 0, done.stderr


async def test_it_needs_neither_torch_nor_the_server(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running:
        done = await asyncio.to_thread(
            run,
            "class Blocked:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.split('.')[0] in ('torch', 'transformers', 'numpy', 'token_swarm', 'token_swarm_server',\n"
            "                                  'grpc_status', 'pydantic'):\n"
            "            raise ImportError(f'blocked: {name}')\n"
            "sys.meta_path.insert(0, Blocked())\n"
            "from token_swarm_client import Client\n"
            f"with Client({running.address!r}, timeout=60) as client:\n"
            "    print(client.generate('cab', seed=1, max_bytes=20).text(), end='')\n",
        )
        assert done.returncode == 0, done.stderr
        with Client(running.address, timeout=60) as client:
            assert done.stdout == await asyncio.to_thread(client.generate("cab", seed=1, max_bytes=20).text)
