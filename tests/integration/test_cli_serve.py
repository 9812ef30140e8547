"""`token-swarm serve` and its clients as real processes, with models of a few kilobytes."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import grpc
import psutil
import pytest

from tests.conftest import save_small_llama
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

CLI = (sys.executable, "-m", "token_swarm_server.cli")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("swarm")
    save_small_llama(folder / "one", 270)
    save_small_llama(folder / "two", 285)
    (folder / "two" / "chat_template.jinja").write_text("{{ raise_exception('Ask me nothing') }}")
    particle = {
        "schema_version": 1,
        "name": "mostly-one",
        "rule": "linear",
        "weights": {"one": 0.9, "two": 0.1},
    }
    (folder / "particles").mkdir()
    (folder / "particles" / "p.json").write_text(json.dumps(particle))
    path = folder / "swarm.yaml"
    path.write_text(
        "experts: {one: {model: ./one}, two: {model: ./two}}\n"
        f"coordinator: {{listen: 'unix:{folder}/s', particles: particles}}\ncache: {folder}/cache\n"
    )
    return path


@pytest.fixture(scope="module")
def server(config):
    """A running `token-swarm serve`; afterwards SIGTERM has stopped it and its experts."""
    with subprocess.Popen(
        [*CLI, "serve", "--config", str(config)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("serving on "):
                break
        assert process.poll() is None, lines
        warned = [line for line in lines if "chat" in line]
        assert len(warned) == 1
        assert warned[0].startswith("expert two: requests with chat will be refused: ")
        assert warned[0].endswith("Ask me nothing\n")
        experts = psutil.Process(process.pid).children()
        assert len(experts) == 2
        yield f"unix:{config.parent}/s"
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 0
        assert not any(expert.is_running() for expert in experts)


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Text as it was written: text mode would turn a carriage return of the model into a newline."""
    done = subprocess.run([*CLI, *arguments], capture_output=True, input=stdin.encode(), timeout=500)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_generate_streams_the_text_and_reports_beside_it(server):
    flags = ("generate", "--prompt", "the cat", "--max-bytes", "12", "--seed", "5", "--address", server)
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert "unit byte, finish" in done.stderr
    document = json.loads(run(*flags, "--json").stdout)
    assert document["text"] == done.stdout
    assert 0 < document["bytes"] <= 12
    assert document["seed"] == 5
    assert {use["expert"] for use in document["experts"]} == {"one", "two"}


def test_an_empty_prompt_begins_a_text(server):
    done = run("generate", "--prompt", "", "--max-bytes", "9", "--seed", str(2**64 - 1), "--json", "--address", server)
    document = json.loads(done.stdout)
    assert 0 < document["bytes"] <= 9
    assert document["seed"] == 2**64 - 1


def test_a_reader_that_leaves_is_told_nothing(server):
    command = [*CLI, "generate", "--prompt", "the cat", "--max-bytes", "400", "--seed", "5", "--address", server]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_a_full_disk_is_one_line(server):
    with Path("/dev/full").open("wb") as full:
        command = [*CLI, "generate", "--prompt", "the cat", "--max-bytes", "9", "--address", server]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


def test_top_ends_on_q_and_leaves_the_terminal_as_it_was(server):
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    command = [*CLI, "top", "--interval", "0.2", "--address", server]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, env=environment) as process:
        shown = b""
        while b"q quits" not in shown:
            shown += os.read(controller, 65536)
        os.write(controller, b"q")
        # What it still draws must be read, or it would wait.
        deadline = time.monotonic() + 60
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                pytest.fail("q did not end it")
            if select.select([controller], [], [], 0.1)[0]:
                os.read(controller, 65536)
        assert process.returncode == 0
    assert termios.tcgetattr(terminal) == before
    os.close(controller)
    os.close(terminal)


def test_generate_takes_a_prompt_from_a_pipe_and_a_particle(server):
    flags = ("--max-tokens", "3", "--temperature", "0", "--json", "--address", server)
    piped = json.loads(run("generate", "--particle", "mostly-one", *flags, stdin="the cat").stdout)
    given = run("generate", "--weights", "one=0.9,two=0.1", "--rule", "linear", "--prompt", "the cat", *flags)
    assert piped["text"] == json.loads(given.stdout)["text"]


def test_score_reports_bits_per_byte(server):
    text = "the cat sat on the mat"
    report = json.loads(run("score", "--text", text, "--json", "--per-byte", "--address", server).stdout)
    assert report["bytes"] == len(text)
    assert set(report["bits_per_byte"]["experts"]) == set(report["tokens"]) == {"one", "two"}
    assert sum(report["per_byte"]["ensemble"]) == pytest.approx(
        report["bits_per_byte"]["ensemble"] * len(text)
    )
    # The byte law adds tokenizations to the canonical one, so it is never the longer code.
    for name, bits in report["bits_per_byte"]["experts"].items():
        assert bits <= report["token_level"]["experts"][name] + 1e-9
    assert "ensemble" in run("score", "--text", text, "--address", server).stdout


def test_particles_are_listed(server):
    listed = json.loads(run("particles", "--json", "--address", server).stdout)["particles"]
    assert [each["name"] for each in listed] == ["mostly-one"]


BAD = {
    "empty pipe": (["generate"], "standard input is empty"),
    "chat": (["generate", "--chat", "--prompt", "x"], "expert 'two' can encode (the model's chat template fails for a"),
    "unknown expert": (["generate", "--prompt", "x", "--weights", "three=1"], "'three'; known: one, two"),
    "unknown particle": (["score", "--text", "x", "--particle", "p"], "'p'; known: mostly-one"),
    "temperature": (["generate", "--prompt", "x", "--temperature", "-1"], "temperature: -1.0"),
    "top_p": (["generate", "--prompt", "x", "--top-p", "nan"], "top_p: nan"),
    "epsilon": (["generate", "--prompt", "x", "--epsilon", "1"], "epsilon: 1.0"),
    "empty text": (["score", "--text", ""], "text"),
    "long prompt": (["generate", "--prompt", "x" * 5000], "context"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD.keys())
def test_what_the_server_refuses_is_one_line_and_exit_code_2(server, arguments, said):
    done = run(*arguments, "--address", server)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_taken_address_is_refused_at_once(server, config):
    done = run("serve", "--config", str(config))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: coordinator.listen: {server} is in use")


def test_generate_can_start_a_server_of_its_own(config):
    done = run(
        "generate", "--config", str(config), "--prompt", "the cat", "--max-bytes", "8", "--temperature", "0"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "Traceback" not in done.stderr


async def stream(stub, seed, max_bytes):
    """The text of one Generate call and its final message."""
    sampling = swarm_pb2.Sampling(seed=seed, temperature=0.5)
    request = swarm_pb2.GenerateRequest(prompt="the cat", max_bytes=max_bytes, sampling=sampling)
    text = ""
    async for message in stub.Generate(request):
        text += message.chunk.text
        last = message
    return text, last.finish


async def test_eight_streams_and_cancelled_ones_over_real_processes(server):
    """Twice as many texts are left half-way as the experts have sequences for; then eight still run at once."""
    async with grpc.aio.insecure_channel(server) as channel:
        stub = swarm_pb2_grpc.SwarmServiceStub(channel)
        alone = [await stream(stub, seed, 30) for seed in range(8)]
        for seed in range(20):
            sampling = swarm_pb2.Sampling(seed=seed, temperature=0.5)
            request = swarm_pb2.GenerateRequest(prompt="the mat", max_bytes=1500, sampling=sampling)
            call = stub.Generate(request)
            await call.read()
            call.cancel()
        together = await asyncio.wait_for(asyncio.gather(*(stream(stub, seed, 30) for seed in range(8))), 120)
        assert [text for text, _ in together] == [text for text, _ in alone]
        assert all(finish.bytes > 0 for _, finish in together)


def test_doctor_says_where_the_memory_of_experts_is(server):
    run("generate", "--address", server, "--prompt", "the cat", "--max-bytes", "20")
    findings = json.loads(run("doctor", "--address", server, "--json").stdout)
    for name in ("one", "two"):
        line = findings[f"memory of {name}"]
        assert re.fullmatch(
            r"[\d,]+ MB: weights [\d,]+, KV of \d+ tokens \d+, tokenizer, libraries and buffers [\d,]+", line
        ), line
        assert int(line.split()[0].replace(",", "")) > 100
