"""Experts as real processes: they come up together, say why they cannot, and never outlive their launcher."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.settings import ExpertSettings
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.launch.launcher import LaunchError, launch
from token_swarm_server.launch.models import resolve_models
from transformers import T5Config, T5ForConditionalGeneration

from tests.conftest import save_small_llama, save_small_tokenizer

START_SECONDS = 240
"""An expert's imports alone take seconds, and much longer beside other work."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A causal language model of a few kilobytes."""
    return save_small_llama(tmp_path_factory.mktemp("models") / "tiny", 300)


@pytest.fixture(scope="module")
def translator(tmp_path_factory) -> Path:
    """A model that is no causal language model."""
    directory = tmp_path_factory.mktemp("models") / "translator"
    config = T5Config(
        vocab_size=save_small_tokenizer(directory, 300), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2
    )
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return directory


def settings_for(tmp_path, **experts):
    tables = {
        name: given if isinstance(given, dict) else {"model": str(given)} for name, given in experts.items()
    }
    return load_settings(experts=tables, cache=tmp_path / "cache")


def quiet():
    return Console(file=io.StringIO())


def children() -> list[psutil.Process]:
    """Experts below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "token_swarm_server.cli" in process.cmdline():
                found.append(process)
    return found


def sockets(endpoints) -> list[Path]:
    return [Path(address.removeprefix("unix:")) for address in endpoints.values()]


async def start(settings):
    models_of = resolve_models(settings.local_experts(), settings.cache, console=quiet())
    async with launch(settings, models_of, console=quiet()) as experts:
        return experts.endpoints


async def test_experts_run_side_by_side_and_are_gone_afterwards(tiny, tmp_path):
    settings = settings_for(tmp_path, one={"model": str(tiny), "threads": 1}, two=tiny)
    settings.pin_cores = True
    models_of = resolve_models(settings.local_experts(), settings.cache, console=quiet())
    async with launch(settings, models_of, console=quiet()) as experts:
        endpoints = experts.endpoints
        assert list(endpoints) == ["one", "two"]
        assert all(path.parent.stat().st_mode & 0o777 == 0o700 for path in sockets(endpoints))
        running = children()
        assert len(running) == 2
        cores = sorted(os.sched_getaffinity(0))
        default = max(1, len(cores) // 2)
        assert [process.environ()["OMP_NUM_THREADS"] for process in running] == ["1", str(default)]
        if len(cores) >= 2:
            first, second = (os.sched_getaffinity(process.pid) for process in running)
            assert first.isdisjoint(second)
        for name, address in endpoints.items():
            connection = await ExpertConnection.connect(address, name, cache=tmp_path / "vocabularies")
            assert connection.spec.vocabulary.text(await connection.tokenize("the cat")) == b"the cat"
            await connection.close()
        # An expert that runs already is used, not started.
        settings = settings_for(tmp_path, one={"address": endpoints["one"]})
        async with launch(settings, {}, console=quiet()) as again:
            assert again.endpoints == {"one": endpoints["one"]}
            assert len(children()) == 2
    assert not any(process.is_running() for process in running)
    assert not any(path.parent.exists() for path in sockets(endpoints))


async def test_one_expert_that_cannot_start_stops_them_all(tiny, translator, tmp_path):
    with pytest.raises(LaunchError, match=r"^expert 't5': model: .*translator.* causal") as caught:
        await start(settings_for(tmp_path, good=tiny, t5=translator))
    assert caught.value.bad_input
    assert "\n" not in str(caught.value)
    assert not children()


async def test_an_expert_that_is_killed_while_starting_shows_its_log(tiny, tmp_path):
    def kill_soon():
        while not (found := children()):
            time.sleep(0.01)
        found[0].kill()

    killer = asyncio.create_task(asyncio.to_thread(kill_soon))
    with pytest.raises(
        LaunchError, match=r"expert 'one' was ended by signal 9 .*logs/one\.log: nothing"
    ) as caught:
        await start(settings_for(tmp_path, one=tiny))
    assert not caught.value.bad_input
    await killer


async def test_an_interpreter_without_the_package_shows_what_it_said(tiny, tmp_path):
    wrong = tmp_path / "python"
    wrong.write_text("#!/bin/sh\necho first\necho No module named token_swarm_server >&2\nexit 1\n")
    wrong.chmod(0o755)
    with pytest.raises(
        LaunchError, match=r"exited with code 1 .*first \| No module named token_swarm_server"
    ):
        await start(settings_for(tmp_path, one={"model": str(tiny), "python": wrong}))


async def test_a_missing_interpreter_is_named(tiny, tmp_path):
    with pytest.raises(LaunchError, match=r"experts\.one\.python: /no/python cannot be run: No such file"):
        await start(settings_for(tmp_path, one={"model": str(tiny), "python": "/no/python"}))


async def test_an_address_where_nothing_runs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("token_swarm_server.launch.launcher.CONNECT_SECONDS", 0.5)
    with pytest.raises(LaunchError, match=r"experts\.one\.address: no expert answers at unix:/no/socket"):
        await start(settings_for(tmp_path, one={"address": "unix:/no/socket"}))


def test_threads_default_to_a_fair_share_of_the_cores(monkeypatch):
    from token_swarm_server.launch import launcher

    monkeypatch.setattr(launcher, "available_cores", lambda: [0, 1, 2, 3, 6])
    assert [launcher._default_threads(n) for n in (1, 2, 3, 9)] == [5, 2, 1, 1]
    experts = {"a": ExpertSettings(model="m", threads=3), "b": ExpertSettings(model="m")}
    assert launcher._share_cores(experts) == {"a": {0, 1, 2}, "b": {3, 6}}
    experts["a"] = ExpertSettings(model="m", threads=4)
    assert launcher._share_cores(experts) == {}


PARENT = """
import asyncio, sys
from pathlib import Path
from rich.console import Console
from token_swarm_server.config.loading import load_settings
from token_swarm_server.launch.launcher import launch
async def main():
    settings = load_settings(experts={"one": {"model": sys.argv[1]}}, cache=Path(sys.argv[2]))
    async with launch(settings, {"one": sys.argv[1]}, console=Console(stderr=True)):
        print("ready", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("wait_until_ready", [True, False], ids=["ready", "loading"])
def test_an_expert_ends_when_its_launcher_is_killed(tiny, tmp_path, wait_until_ready):
    command = [sys.executable, "-c", PARENT, str(tiny), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        deadline = time.monotonic() + START_SECONDS
        while not (experts := children()):
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if wait_until_ready:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    gone, alive = psutil.wait_procs(experts, timeout=60)
    assert gone
    assert not alive
