"""The command line refuses bad input in one line, and starts fast."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from token_swarm_server.assets import search_data
from token_swarm_server.benchmark import tables as benchmark
from token_swarm_server.cli import app, options, report, session
from token_swarm_server.cli.client import plain
from token_swarm_server.cli.demo import Demo, Word, Written, carried_words
from token_swarm_server.cli.demo_display import DemoDisplay
from token_swarm_server.cli.errors import CliError
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.places import EXAMPLES
from typer.testing import CliRunner

from token_swarm.particle import Mixture, Particle, Rule
from token_swarm.v1 import swarm_pb2

COMMANDS = (
    "demo", "serve", "generate", "score", "search", "data", "examples", "expert", "health", "top", "doctor",
    "particles", "tokens create", "bench latency", "bench load",
)  # fmt: skip


def run(*arguments: str, stdin: bytes | None = None):
    return CliRunner().invoke(app, arguments, input=stdin)


def refused(*arguments: str, stdin: bytes | None = None, code: int = 2) -> str:
    """The error line of a command that must fail with `code`."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"token-swarm {command}" in result.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS, "tokens", "bench", "particles show"])
def test_help_has_a_short_flag_and_fits_a_terminal(command):
    result = run(*command.split(), "-h")
    assert result.exit_code == 0
    assert result.stdout == run(*command.split(), "--help").stdout
    assert "-h, --help" in result.stdout


def test_the_version_is_printed():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"token-swarm {version('token-swarm')}\n")


def test_shells_complete_commands():
    asked = {"_TOKEN_SWARM_COMPLETE": "complete_bash", "COMP_WORDS": "token-swarm part", "COMP_CWORD": "1"}
    environment = {**os.environ, **asked}
    command = [sys.executable, "-c", "from token_swarm_server.cli import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["particles"]
    assert "--install-completion" in run("--help").stdout


@pytest.mark.parametrize("group", ["tokens", "bench"])
def test_a_group_without_a_command_shows_its_help(group):
    result = run(group)
    assert result.exit_code == 2
    assert f" {group} [OPTIONS] COMMAND [ARGS]..." in result.stderr.splitlines()[0]
    assert "error" not in result.stderr


LONG = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma3")


def long_tables():
    experts = [
        swarm_pb2.ExpertInfo(
            name=name, architecture="Qwen2MoeForCausalLM", group=1, vocabulary_size=262144, max_context=131072,
            dtype="bfloat16", state=state,
        )
        for name, state in zip(LONG, (2, 2, 3), strict=True)
    ]  # fmt: skip
    uses = [
        swarm_pb2.ExpertUsage(
            expert=name, share=0.3334, tokens=12345, forwards=23456, wasted_forwards=1234, draft_tokens=12345,
            accepted_draft_tokens=9999,
        )
        for name in LONG
    ]  # fmt: skip
    finish = swarm_pb2.Finish(bytes=12345, experts=uses, timings=swarm_pb2.Timings(total_seconds=123.4))
    weights = [swarm_pb2.ExpertWeight(expert=name, weight=-1 / 3) for name in LONG]
    particle = swarm_pb2.ParticleInfo(
        name="mostly-code-2025", mixture=swarm_pb2.Mixture(rule=swarm_pb2.RULE_LOG_LINEAR, weights=weights),
        utility="bits_per_byte", dev_score=-1.234567, test_score=-1.234567,
    )  # fmt: skip
    bits = dict.fromkeys(LONG, 1.23456)
    score = {
        "bits_per_byte": {"ensemble": 1.2, "experts": bits},
        "token_level": {"experts": bits},
        "tokens": dict.fromkeys(LONG, 123456),
    }
    load = benchmark.Table(
        "Under load", ("load", "mixture", "requests", "TTFT", "TPOT", "ITL", "E2EL", "requests/s", "bytes/s"),
        [("8 streams", "ensemble", "32", *["12,345 / 12,345 / 12,345"] * 4, "12.34", "123,456.7")],
    )  # fmt: skip
    return {
        "experts": report.experts_table(experts),
        "finish": report.finish_table(finish),
        "particles": report.particles_table([particle]),
        "score": report.score_table(score),
        "bench": load.rich(80),
    }


@pytest.mark.parametrize("table", ["experts", "finish", "particles", "score", "bench"])
def test_tables_are_readable_at_80_columns(table):
    console = Console(file=io.StringIO(), width=80)
    console.print(long_tables()[table])
    shown = console.file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    whole = {
        "experts": ("262,144", "131,072", "down"),
        "finish": ("23456", "9999/12345"),
        "particles": ("-1.235",),
        "score": ("1.2346", "123456"),
        "bench": ("12,345 / 12,345 / 12,345", "123,456.7"),
    }
    for number in whole[table]:
        assert number in shown


@pytest.mark.parametrize("name", ["TLS_CA", "TOKEN_FILE"])
def test_a_variable_that_is_wrong_is_named_instead_of_its_flag(monkeypatch, name):
    monkeypatch.setenv(f"TOKEN_SWARM_{name}", "/no/file")
    line = refused("generate", "--prompt", "x")
    assert line.startswith(f"error: environment: TOKEN_SWARM_{name}: ")
    assert "No such file" in line
    flag = f"--{name.lower().replace('_', '-')}"
    assert refused("generate", "--prompt", "x", flag, "/none").startswith(f"error: {flag}: ")


def test_a_misspelt_variable_is_refused_by_clients_as_well(monkeypatch):
    monkeypatch.setenv("TOKEN_SWARM_TOKN", "secret")
    line = refused("generate", "--prompt", "x")
    assert "environment: TOKEN_SWARM_TOKN: unknown (did you mean TOKEN_SWARM_TOKEN?)" in line
    assert "secret" not in line


def test_an_empty_input_is_refused_and_an_empty_prompt_is_none():
    assert "--prompt: standard input is empty" in refused("generate", stdin=b"")


def test_a_benchmark_that_could_not_be_saved_is_not_run(tmp_path):
    assert f"--save: {tmp_path} cannot be written: Is a directory" in refused("bench", "load", "--save", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "cannot be written: File exists" in refused("bench", "load", "--save", str(tmp_path / "file" / "x"))


BAD = {
    "a prompt without its flag": (["generate", "hello"], ["(hello)", "--prompt TEXT"]),
    "log level": (["serve", "--config", "c", "--log-level", "x"], ["--log-level': 'x' is not one of 'debug'"]),
    "a flag of no command": (["--vers"], ["--vers"]),
    "unknown command": (["generat"], ["generat"]),
    "unknown flag": (["generate", "--promt", "x"], ["--promt"]),
    "not a number": (
        ["generate", "--prompt", "x", "--temperature", "warm"],
        ["--temperature", "valid number"],
    ),
    "max_bytes 0": (
        ["generate", "--prompt", "x", "--max-bytes", "0"],
        ["--max-bytes", "greater than or equal to 1"],
    ),
    "top_k 0": (["generate", "--prompt", "x", "--top-k", "0"], ["--top-k", "greater than or equal to 1"]),
    "seed": (["generate", "--prompt", "x", "--seed", "-1"], ["--seed", "greater than or equal to 0"]),
    "rule": (["generate", "--prompt", "x", "--rule", "max"], ["--rule", "linear", "log-linear"]),
    "unit": (["generate", "--prompt", "x", "--unit", "word"], ["--unit", "token", "byte"]),
    "rule alone": (["generate", "--prompt", "x", "--rule", "linear"], ["--rule", "--weights"]),
    "weights form": (
        ["generate", "--prompt", "x", "--weights", "a:1"],
        ["--weights", "'a:1'", "NAME=NUMBER"],
    ),
    "weights number": (["generate", "--prompt", "x", "--weights", "a=b"], ["--weights", "'a=b'"]),
    "weights empty": (["generate", "--prompt", "x", "--weights", ""], ["--weights", "NAME=NUMBER"]),
    "weights twice": (
        ["generate", "--prompt", "x", "--weights", "a=1,a=2"],
        ["--weights", "a is given twice"],
    ),
    "weights nan": (["generate", "--prompt", "x", "--weights", "a=nan"], ["weights[a]", "in [-1000, 1000]"]),
    "weights zero": (["generate", "--prompt", "x", "--weights", "a=0,b=0"], ["weights", "not 0"]),
    "negative under linear": (
        ["generate", "--prompt", "x", "--weights", "a=-1,b=2", "--rule", "linear"],
        ["weights[a]", "-1", "in [0, 1000]"],
    ),
    "particle and weights": (
        ["score", "--text", "x", "--particle", "p", "--weights", "a=1"],
        ["--particle", "leave out --weights"],
    ),
    "invalid UTF-8 prompt": (
        ["generate", "--prompt", "a\udcff"],
        ["--prompt", "not valid UTF-8 at character 1"],
    ),
    "missing text": (["score", "--text-file", "/no/file"], ["--text-file", "/no/file", "No such file"]),
    "two texts": (["score", "--text", "x", "--text-file", "y"], ["--text-file", "not both"]),
    "per byte": (["score", "--text", "x", "--per-byte"], ["--per-byte", "--json"]),
    "config and address": (
        ["generate", "--prompt", "x", "--config", "c.yaml", "--address", "localhost:1"],
        ["--address", "--config"],
    ),
    "missing config": (["serve", "--config", "/no/config.yaml"], ["/no/config.yaml", "No such file"]),
    "expert name": (["expert", "Big", "--model", "m"], ["NAME", "'Big'", "[a-z0-9]"]),
    "expert dtype": (["expert", "a", "--model", "m", "--dtype", "int4"], ["--dtype", "'int4'", "'bfloat16'"]),
    "expert backend": (["expert", "a", "--model", "m", "--backend", "x"], ["--backend", "'transformers'"]),
    "expert model": (["expert", "a", "--model", "/no/model"], ["/no/model is not a directory"]),
    "particle file": (["particles", "show", "/no/file.json"], ["/no/file.json", "No such file"]),
    "particle folder": (["particles", "--dir", "/no/folder"], ["/no/folder", "existing folder"]),
}


@pytest.mark.parametrize(("arguments", "parts"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(arguments, parts):
    line = refused(*arguments)
    for part in parts:
        assert part in line


def test_input_that_is_not_text_is_refused():
    assert "standard input is not valid UTF-8 at byte 2" in refused("generate", stdin=b"ab\xff")


@pytest.mark.parametrize(
    "config", ["windwo: 1", "experts: {a: {model: /no/model}}", "experts: {a: {model: demo:x}}"]
)
def test_a_bad_configuration_starts_nothing(tmp_path, config):
    (tmp_path / "c.yaml").write_text(config)
    code = 2 if "demo" not in config else 1
    for command in (["serve"], ["generate", "--prompt", "x"], ["score", "--text", "x"]):
        refused(*command, "--config", str(tmp_path / "c.yaml"), code=code)


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["score", "--text", "x"], ["particles"]], ids=lambda c: c[0]
)
def test_a_server_that_is_not_there_is_exit_code_1_and_says_how_to_start_one(command, tmp_path):
    line = refused(*command, "--address", f"unix:{tmp_path}/none.sock", code=1)
    assert "no server answers" in line
    assert "token-swarm serve" in line


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["port", "socket"])
def test_an_address_in_use_is_refused_before_anything_starts(tmp_path, family):
    with socket.socket(family) as taken:
        taken.bind(("127.0.0.1", 0) if family is socket.AF_INET else str(tmp_path / "s"))
        taken.listen()
        name = taken.getsockname()
        listen = f"unix:{name}" if family is socket.AF_UNIX else f"127.0.0.1:{name[1]}"
        (tmp_path / "c.yaml").write_text("experts: {a: {model: /no/model}}")
        line = refused("serve", "--config", str(tmp_path / "c.yaml"), "--listen", listen)
    assert f"coordinator.listen: {listen} is in use" in line


def test_an_experts_address_in_use_is_refused_before_its_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused("expert", "a", "--model", "/no/model", "--address", address)
    assert f"--address: {address} is in use" in line


def test_a_folder_of_particles_that_is_missing_is_found_before_anything_starts(tmp_path):
    (tmp_path / "c.yaml").write_text("experts: {a: {model: /no/model}}\ncoordinator: {particles: none}\n")
    assert f"{tmp_path}/none" in refused("serve", "--config", str(tmp_path / "c.yaml"), "--listen", "127.0.0.1:0")


def test_an_error_shows_no_terminal_sequences(tmp_path):
    assert "\\x1b[31m" in refused("particles", "show", str(tmp_path / "a\x1b[31mb"))


def test_particles_of_a_folder(tmp_path):
    particle = Particle("p", Mixture({"a": 0.25, "b": -1.0}, Rule.LOG_LINEAR, {"a": 0.5}), utility="accuracy")
    particle.save(tmp_path / "p.json")
    listed = json.loads(run("particles", "--dir", str(tmp_path), "--json").stdout)["particles"]
    assert [each["name"] for each in listed] == ["p"]
    assert listed[0]["mixture"]["rule"] == "log_linear"
    assert listed[0]["mixture"]["weights"][1] == {"expert": "b", "weight": -1.0, "temperature": None}
    shown = run("particles", "--dir", str(tmp_path)).stdout
    assert "a=0.25 " in shown
    assert "b=-1 " in shown
    assert run("particles", "show", str(tmp_path / "p.json")).stdout == particle.to_json()


def test_a_particle_that_is_wrong_is_explained(tmp_path):
    (tmp_path / "p.json").write_text('{"schema_version": 1, "name": "p", "rule": "max"}')
    assert "p.json: rule: 'max'" in refused("particles", "show", str(tmp_path / "p.json"))


def test_json_of_a_message_keeps_numbers_numbers():
    finish = swarm_pb2.Finish(
        reason=swarm_pb2.FINISH_REASON_MAX_BYTES,
        bytes=2**40,
        unit=swarm_pb2.UNIT_BYTE,
        experts=[swarm_pb2.ExpertUsage(expert="a", tokens=3)],
        timings=swarm_pb2.Timings(total_seconds=0.5),
    )
    document = plain(finish)
    assert document["reason"] == "max_bytes"
    assert document["unit"] == "byte"
    assert document["bytes"] == 2**40
    assert document["seed"] is None
    assert document["experts"][0]["tokens"] == 3
    assert document["timings"]["first_byte_seconds"] is None
    json.dumps(document)


def test_doctor_reports_on_an_empty_cache(tmp_path):
    findings = json.loads(run("doctor", "--cache", str(tmp_path), "--json").stdout)
    assert findings["demo:smollm2"].startswith("not fetched yet")
    assert findings["cores"] >= 1
    assert findings["torch"][0].isdigit()
    assert findings["same text"].startswith("float32: ")


def test_examples_are_written_and_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("examples")
    assert result.exit_code == 0
    assert "examples/demo.yaml" in result.stdout.split()
    settings = load_settings(tmp_path / "examples" / "demo.yaml")
    assert settings.experts.keys() == {"smollm2", "qwen2.5-coder"} == settings.coordinator.weights.keys()
    assert settings.coordinator.particles == tmp_path / "examples" / "particles"
    assert load_settings(tmp_path / "examples" / "three.yaml").experts.keys() > settings.experts.keys()
    assert "exists; give another folder, or --overwrite" in refused("examples")
    assert "`token-swarm examples` writes the examples" in refused("serve", "--config", "examples/other.yaml")
    assert run("examples", "--overwrite").exit_code == 0
    (tmp_path / "file").touch()
    assert "cannot be written" in refused("examples", "file", code=1)
    assert "is where they come from" in refused("examples", str(EXAMPLES))


def test_data_prints_one_path_or_all(tmp_path, monkeypatch):
    made = {name: tmp_path / f"{name}.jsonl" for name in search_data.SETS}
    asked = {}

    def ensure(cache, **options):
        asked.update(options, cache=cache)
        return made

    monkeypatch.setattr(search_data, "ensure_search_data", ensure)
    assert run("data", "code", "--cache", str(tmp_path)).stdout == f"{made['code']}\n"
    assert (asked["cache"], asked["texts"]) == (tmp_path, None)
    table = run("data", "--text", __file__).stdout
    assert all(str(path) in table for path in made.values())
    assert asked["texts"] == [Path(__file__)]
    assert json.loads(run("data", "--json").stdout) == {name: str(path) for name, path in made.items()}
    assert "there is no set cod; allowed: code, prose" in refused("data", "cod")
    assert "no/file is no file" in refused("data", "--text", "no/file")


def test_serve_without_a_configuration_serves_the_demo_pair(monkeypatch):
    served = {}

    def ready(settings, console):
        served["experts"] = settings.experts
        raise CliError("enough")

    monkeypatch.setattr(session, "ready_models", ready)
    assert refused("serve", "--listen", "127.0.0.1:0") == "error: enough"
    assert {name: expert.model for name, expert in served["experts"].items()} == {
        "smollm2": "demo:smollm2",
        "qwen2.5-coder": "demo:qwen2.5-coder",
    }


def test_a_word_is_carried_by_the_expert_that_thought_it_more_probable():
    text = "é it \n"
    ahead, behind, near = math.log(0.9), math.log(0.1), math.log(0.8)
    log_probs = {"a": [ahead, 0.0, 0.0, near, 0.0, 0.0, behind], "b": [behind, 0.0, 0.0, ahead, 0.0, 0.0, ahead]}
    assert carried_words(text, log_probs) == [Word("é", "a"), Word(" it", None), Word(" \n", "b")]
    assert carried_words(text, {"a": log_probs["a"]})[1] == Word(" it", "a")


def test_the_demo_fits_80_columns_and_has_no_colour_where_nobody_looks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    usage = [swarm_pb2.ExpertUsage(expert=name, share=0.5) for name in ("smollm2", "qwen2.5-coder")]
    timings = swarm_pb2.Timings(total_seconds=12.0)
    written = Written("word " * 40, swarm_pb2.Finish(bytes=200, experts=usage, timings=timings))
    words = [Word("word ", "smollm2")] * 40
    display = DemoDisplay(["smollm2", "qwen2.5-coder"])
    display.show_prompt("why? " * 30, chat=True)
    with display.text("") as passage:
        passage(written.text)
        passage.colour(words)
    display.show_legend()
    bits = {"": 1.2345, "smollm2": 1.5, "qwen2.5-coder": 1.25}
    alone = dict.fromkeys(("smollm2", "qwen2.5-coder"), written)
    display.show_table(Demo("why?", alone, written, {}, words, {"prose": bits, "code": bits}))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "1.234" in shown
    assert "100%" in shown
    assert "60" in shown


def test_experts_without_a_chat_template_are_warned_of(capsys):
    options.warn_of_plain_experts(["gemma3", "a\x1b[2J"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: gemma3 has no chat template")
    assert len(lines) == 2
    assert "\x1b" not in lines[1]


def test_the_command_line_loads_no_model_library():
    code = "import sys, token_swarm_server.cli, token_swarm_server.cli.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "token_swarm_server.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert "Usage: token-swarm" in done.stdout
