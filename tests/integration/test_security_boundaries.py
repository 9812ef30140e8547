"""What outsiders cannot reach: private files and sockets, and the paths, formats and log lines that a request's text
might slip into.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
from token_swarm_server.expert_protocol.shared_memory import SegmentWriter
from token_swarm_server.expert_server.server import ExpertServer
from token_swarm_server.rpc.bearer_tokens import create_token
from token_swarm_server.telemetry.logs import JsonFormatter, TextFormatter

from tests.integration.guarded_calls import channel_to, status_of
from tests.integration.test_coordinator import collect, coordinator
from tests.laws.ensembles import NESTED, toys
from token_swarm.v1 import swarm_pb2

# Files and sockets.


@contextmanager
def permissive_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


async def test_sockets_and_shared_memory_are_private_whatever_the_umask(tmp_path):
    with permissive_umask():
        expert = ExpertServer(toys([NESTED], max_context=50)["e0"], f"unix:{tmp_path}/run/expert.sock")
        await expert.start()
        try:
            assert os.umask(0) == 0
            path = tmp_path / "run" / "expert.sock"
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        finally:
            await expert.stop()
        async with coordinator(tmp_path, listen=f"unix:{tmp_path}/public/s") as running:
            path = tmp_path / "public" / "s"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert running.address == f"unix:{path}"
        segment = SegmentWriter(tmp_path, 64)
        try:
            assert stat.S_IMODE((tmp_path / segment.name).stat().st_mode) == 0o600
        finally:
            segment.unlink()
            segment.close()


# What a request holds is never more than text.


async def test_text_of_a_request_reaches_no_path_no_format_and_no_log_line_of_its_own(tmp_path, caplog):
    particles = tmp_path / "particles"
    particles.mkdir()
    (tmp_path / "secret.json").write_text(json.dumps({"name": "secret"}))
    before = sorted(tmp_path.rglob("*"))
    hostile = (
        "../secret",
        "/etc/passwd",
        "secret.json\0",
        "%s%s%n %(name)s {0} {self} $(id) `id` ; id",
        "first\nERROR a line of its own\r\n",
        "\x1b]0;title\x07\x1b[2J",
        "\u2028\u202e\ufeff",
        "x" * 100_000,
    )
    async with coordinator(tmp_path, particles=str(particles)) as running:
        with caplog.at_level(logging.DEBUG, "token_swarm_server"):
            stub = running.stub
            for text in hostile:
                weights = swarm_pb2.Mixture(weights=[swarm_pb2.ExpertWeight(expert=text, weight=1)])
                no_weight = swarm_pb2.Mixture(weights=[swarm_pb2.ExpertWeight(expert=text, weight=math.nan)])
                requests = {
                    "NOT_FOUND": swarm_pb2.GenerateRequest(request_id=text, prompt="cab", particle=text),
                    "NOT_FOUND ": swarm_pb2.GenerateRequest(request_id=text, prompt="cab", mixture=weights),
                    "INVALID_ARGUMENT": swarm_pb2.GenerateRequest(request_id=text, prompt="cab", mixture=no_weight),
                    "OK": swarm_pb2.GenerateRequest(request_id=text, prompt="cab", stop=[text], max_bytes=3),
                    # Toy experts know few letters.
                    "INVALID_ARGUMENT ": swarm_pb2.GenerateRequest(request_id=text, prompt=text, max_bytes=3),
                }
                for code, request in requests.items():
                    call = stub.Generate(request, metadata=(("traceparent", "%s {0}"),))
                    with suppress(grpc.aio.AioRpcError):
                        await collect(call)
                    assert (await call.code()).name == code.strip(), text[:80]
                score = stub.Score(swarm_pb2.ScoreRequest(request_id=text, text="abc", particle=text))
                assert (await status_of(score))[0] is grpc.StatusCode.NOT_FOUND
    own = [record for record in caplog.records if record.name.startswith("token_swarm")]
    assert len(own) >= 5 * len(hostile)
    for record in own:
        for formatter in (TextFormatter(), JsonFormatter()):
            line = formatter.format(record)
            assert line.isprintable(), line[:200]
            assert len(line) < 2_000
    made = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "cache" not in path.parts]
    assert all(re.fullmatch(r"e\d\.sock", path.name) for path in made), made


async def test_the_name_of_a_method_cannot_forge_a_log_line(tmp_path, tokens, caplog):
    create_token(tokens, "alice")
    async with coordinator(tmp_path, tokens=str(tokens)) as running, channel_to(running, None) as channel:
        with caplog.at_level(logging.INFO):
            for method in ("/a%s%n{0}/b", f"/{'x' * 4000}/y"):
                code, _ = await status_of(channel.unary_unary(method)(b""))
                assert code is grpc.StatusCode.UNAUTHENTICATED
    lines = [record.getMessage() for record in caplog.records if record.name == "token_swarm_server.rpc.auth"]
    assert len(lines) == 2
    assert all(line.isprintable() and len(line) < 200 for line in lines)
