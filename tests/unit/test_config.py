"""One configuration out of a file, the environment and flags; one line for everything wrong with it."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from token_swarm_server.config.loading import ConfigError, load_settings
from token_swarm_server.config.places import EXAMPLES, default_cache
from token_swarm_server.config.settings import OTHER_VARIABLES, ClientTls, ExpertSettings, ServerTls

from token_swarm.mixing.defaults import DEFAULT_EPSILON, DEFAULT_WINDOW
from token_swarm.particle import Particle

ROOT = Path(__file__).parents[2]
MINIMAL = "experts:\n  one:\n    model: demo:smollm2\n"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("TOKEN_SWARM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def load(tmp_path):
    def load(text: str, **overrides):
        path = tmp_path / "swarm.yaml"
        path.write_text(text)
        return load_settings(path, **overrides)

    return load


def test_defaults_are_those_of_the_library(load):
    coordinator = load(MINIMAL).coordinator
    assert (coordinator.epsilon, coordinator.window) == (DEFAULT_EPSILON, DEFAULT_WINDOW)


def test_flags_override_the_environment_which_overrides_the_file(load, monkeypatch):
    text = MINIMAL + "coordinator: {epsilon: 0.2, window: 3, max_queue: 7}\n"
    monkeypatch.setenv("TOKEN_SWARM_COORDINATOR__WINDOW", "4")
    monkeypatch.setenv("TOKEN_SWARM_COORDINATOR__MAX_QUEUE", "8")
    coordinator = load(text, coordinator={"max_queue": 9}).coordinator
    assert (coordinator.epsilon, coordinator.window, coordinator.max_queue) == (0.2, 4, 9)


def test_the_environment_reaches_one_key_of_one_expert(load, monkeypatch):
    monkeypatch.setenv("TOKEN_SWARM_EXPERTS__ONE__THREADS", "3")
    monkeypatch.setenv("TOKEN_SWARM_COORDINATOR__WINDOW", "null")
    settings = load(MINIMAL)
    assert settings.experts == {"one": ExpertSettings(model="demo:smollm2", threads=3)}
    assert settings.coordinator.window is None


def test_paths_are_relative_to_the_file_and_hub_ids_are_left_alone(load, tmp_path):
    (tmp_path / "local").mkdir()
    settings = load(
        "experts:\n"
        "  a: {model: local}\n"
        "  b: {model: ./missing, python: venv/bin/python}\n"
        "  c: {model: owner/name}\n"
        "  d: {model: /absolute}\n"
        "  e: {address: '127.0.0.1:1', tls: {ca: ca.pem, certificate: /c.pem, key: k.pem}}\n"
        "coordinator:\n"
        "  particles: here\n"
        "  tokens: tokens.json\n"
        "  tls: {certificate: c.pem, key: ~/k.pem, client_ca: ca.pem, client_names: [alice.example]}\n"
    )
    models = {name: expert.model for name, expert in settings.experts.items()}
    assert models == {
        "a": str(tmp_path / "local"),
        "b": str(tmp_path / "missing"),
        "c": "owner/name",
        "d": "/absolute",
        "e": None,
    }
    assert settings.experts["b"].python == tmp_path / "venv/bin/python"
    assert settings.coordinator.particles == tmp_path / "here"
    assert settings.coordinator.tokens == tmp_path / "tokens.json"
    home = Path.home()
    assert settings.coordinator.tls == ServerTls(
        certificate=tmp_path / "c.pem",
        key=home / "k.pem",
        client_ca=tmp_path / "ca.pem",
        client_names=["alice.example"],
    )
    assert settings.experts["e"].tls == ClientTls(
        ca=tmp_path / "ca.pem", certificate=Path("/c.pem"), key=tmp_path / "k.pem"
    )
    assert set(settings.local_experts()) == {"a", "b", "c", "d"}


BAD = {
    "unknown key": ("expert: {}\n" + MINIMAL, ["expert: unknown key", "experts, coordinator, cache"]),
    "unknown key of an expert": (
        "experts: {one: {model: m, treads: 1}}",
        ["experts.one.treads: unknown key", "model, backend, engine, device", "threads"],
    ),
    "unknown key of the coordinator": (
        MINIMAL + "coordinator: {windwo: 1}",
        ["coordinator.windwo: unknown key", "epsilon, window"],
    ),
    "no experts": ("cache: x", ["experts: at least one expert"]),
    "empty experts": ("experts: {}", ["experts: at least one expert"]),
    "empty file": ("", ["experts: at least one expert"]),
    "bad name": ("experts: {One: {model: m}}", ["experts.One: not a valid expert name", "[a-z0-9]"]),
    "no model": ("experts: {one: {}}", ["experts.one: give model", "address"]),
    "dtype": ("experts: {one: {model: m, dtype: int8}}", ["experts.one.dtype", "'bfloat16'", "'int8'"]),
    "threads": (
        "experts: {one: {model: m, threads: 0}}",
        ["experts.one.threads", "greater than or equal to 1"],
    ),
    "weights name no expert": (
        MINIMAL + "coordinator: {weights: {two: 1}}",
        ["coordinator.weights.two: there is no such expert; known: one"],
    ),
    "weights are all zero": (MINIMAL + "coordinator: {weights: {one: 0}}", ["coordinator.weights", "not 0"]),
    "weight is no number": (
        MINIMAL + "coordinator: {weights: {one: .nan}}",
        ["coordinator.weights[one]", "[-1000, 1000]"],
    ),
    "negative under linear": (
        MINIMAL + "coordinator: {rule: linear, weights: {one: -1}}",
        ["coordinator.weights[one]", "[0, 1000]"],
    ),
    "listen on the network": (
        MINIMAL + "coordinator: {listen: '0.0.0.0:1'}",
        ["coordinator.listen", "127.0.0.1"],
    ),
    "public without tls": (
        MINIMAL + "coordinator: {listen: '[::]:1', tokens: t}",
        ["coordinator.listen", "[::]:1 can be reached from other machines, but is not encrypted;", "allow_insecure"],
    ),
    "public without callers": (
        MINIMAL + "coordinator: {listen: '0.0.0.0:1', tls: {certificate: c, key: k}}",
        ["coordinator.listen", "but lets everybody call", "coordinator.tokens or tls.client_ca"],
    ),
    "unknown key of tls": (
        MINIMAL + "coordinator: {tls: {certificate: c, key: k, cert: c}}",
        ["coordinator.tls.cert: unknown key; allowed: certificate, key, client_ca, client_names"],
    ),
    "unknown key of an expert's tls": (
        "experts: {tls: {address: 'a:1', tls: {client_ca: c}}}",
        ["experts.tls.tls.client_ca: unknown key; allowed: ca, certificate, key"],
    ),
    "tls without a key": (MINIMAL + "coordinator: {tls: {certificate: c}}", ["coordinator.tls.key: is needed"]),
    "names without an authority": (
        MINIMAL + "coordinator: {tls: {certificate: c, key: k, client_names: [a]}}",
        ["coordinator.tls", "client_names: needs client_ca"],
    ),
    "half a pair": (
        "experts: {one: {address: 'a:1', tls: {certificate: c}}}",
        ["experts.one.tls", "give certificate and key, or neither"],
    ),
    "tls of a local expert": ("experts: {one: {model: m, tls: {ca: c}}}", ["experts.one", "expert with an address"]),
    "listen port": (MINIMAL + "coordinator: {listen: '127.0.0.1:70000'}", ["coordinator.listen", "port"]),
    "listen socket": (
        MINIMAL + "coordinator: {listen: 'unix:relative'}",
        ["coordinator.listen", "unix:/absolute"],
    ),
    "epsilon": (MINIMAL + "coordinator: {epsilon: 1}", ["coordinator.epsilon", "less than 1"]),
    "a word for an expert": ("experts: {one: /models/a}", ["experts.one: write {model: /models/a}"]),
    "nothing for an expert": ("experts: {one: }", ["experts.one: write {model: DIRECTORY}"]),
    "a list of experts": ("experts: [one]", ["experts: must be a table of experts by name"]),
    "a word for a table": (
        MINIMAL + "coordinator: {metrics: 'a:1'}",
        ["metrics: must be a table", "listen, allow_remote"],
    ),
    "misspelt experts": ("exprts: {one: {model: m}}", ["exprts: unknown key (did you mean experts?)"]),
    "a tab": ("experts:\n\tone: m", ["line 2", "indented with a tab"]),
    "a number for text": (MINIMAL + "coordinator: {listen: 50061}", ["coordinator.listen: must be a text", "50061"]),
    "a word for a number": (
        MINIMAL + "coordinator: {window: few}",
        ["coordinator.window: must be an integer (is 'few')"],
    ),
    "a URL": (
        "experts: {one: {address: 'http://127.0.0.1:1/'}}",
        ["experts.one.address: must be host:port", "it is gRPC, not http: write 127.0.0.1:1 (is"],
    ),
    "no port": ("experts: {one: {address: expert}}", ["experts.one.address: must be host:port", "expert:50061"]),
    "port 0": ("experts: {one: {address: 'expert:0'}}", ["experts.one.address", "from 1 to 65535"]),
    "twice": (MINIMAL + "  one: {model: other}\n", ["line 4", "'one' is given twice"]),
    "not YAML": ("experts: [", ["line 1", "not valid YAML"]),
    "not a mapping": ("- experts", ["must be a mapping", "experts, coordinator, cache"]),
}


@pytest.mark.parametrize(("text", "parts"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_said_in_one_line(load, tmp_path, text, parts):
    with pytest.raises(ConfigError) as caught:
        load(text)
    message = str(caught.value)
    assert message.startswith(f"config {tmp_path}/swarm.yaml:")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config .*/none\.yaml: cannot be read: No such file"):
        load_settings(tmp_path / "none.yaml")


def test_a_directory_is_not_a_file_and_a_relative_path_says_from_where(tmp_path, monkeypatch):
    (tmp_path / "swarm.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=rf"Is a directory; give a file in it, such as {tmp_path}/swarm\.yaml"):
        load_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"none\.yaml: cannot be read: No such file .*looked in {tmp_path}"):
        load_settings(Path("none.yaml"))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"experts:\n\xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 9"):
        load_settings(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TOKEN_SWARM_COORDINATR__WINDOW", " (did you mean TOKEN_SWARM_COORDINATOR__WINDOW?)"),
        ("TOKEN_SWARM_LISTEN", " (did you mean TOKEN_SWARM_COORDINATOR__LISTEN?)"),
        ("TOKEN_SWARM_TOKN", " (did you mean TOKEN_SWARM_TOKEN?)"),
        ("TOKEN_SWARM_XYZ", ""),
    ],
)
def test_an_unknown_variable_is_refused(load, monkeypatch, name, meant):
    monkeypatch.setenv(name, "1")
    line = re.escape(f"environment: {name}: unknown{meant}; allowed: TOKEN_SWARM_EXPERTS")
    with pytest.raises(ConfigError, match=line):
        load(MINIMAL)


BAD_VARIABLES = {
    "value": ("COORDINATOR__WINDOW", "x", "coordinator.window: must be an integer (is 'x')"),
    "key": ("COORDINATOR__WINDWO", "1", "coordinator.windwo: unknown key (did you mean window?)"),
    "several keys": ("COORDINATOR__LISTEN", "0.0.0.0:1", "coordinator.listen: 0.0.0.0:1 can be reached"),
    "a table's names": ("COORDINATOR__WEIGHTS__TWO", "1", "coordinator.weights.two: there is no such expert"),
    "below a name": ("EXPERTS__ONE__THREADS", "0", "experts.one.threads: must be greater than or equal to 1"),
    "an expert that is nowhere": ("EXPERTS__TWO__THREADS", "2", "experts.two: give model"),
    "part of a table": ("COORDINATOR__TLS__CERTIFICATE", "x", "coordinator.tls.key: is needed"),
    "a table": ("COORDINATOR", '{"window": "x"}', "coordinator.window: must be an integer"),
    "no JSON": ("COORDINATOR", "x", "must be JSON"),
    "half JSON": ("EXPERTS__ONE__ENGINE", "{", "must be JSON"),
}


@pytest.mark.parametrize(("name", "value", "said"), BAD_VARIABLES.values(), ids=BAD_VARIABLES.keys())
def test_what_a_variable_makes_wrong_names_the_variable_and_not_the_file(load, monkeypatch, name, value, said):
    monkeypatch.setenv(f"TOKEN_SWARM_{name}", value)
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL)
    assert str(caught.value).startswith(f"environment: TOKEN_SWARM_{name}: {said}")


def test_what_a_flag_makes_wrong_names_the_flag(load, monkeypatch):
    monkeypatch.setenv("TOKEN_SWARM_COORDINATOR__LISTEN", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"^--listen: coordinator\.listen: must be"):
        load(MINIMAL, coordinator={"listen": "x"})


def test_a_heading_without_keys_is_no_mistake(load):
    assert load(MINIMAL + "coordinator:\n  # listen: 127.0.0.1:1\n").model_dump() == load(MINIMAL).model_dump()


def test_variables_for_clients_are_no_keys(load, monkeypatch):
    for name in OTHER_VARIABLES:
        monkeypatch.setenv(name, "x")
    assert load(MINIMAL).coordinator.tokens is None


def test_the_cache_lies_in_the_checkout_or_else_with_the_users_caches(load, tmp_path, monkeypatch):
    assert load(MINIMAL).cache == ROOT / ".cache"
    monkeypatch.setenv("TOKEN_SWARM_CACHE", "/elsewhere")
    assert load(MINIMAL).cache == Path("/elsewhere")
    installed = tmp_path / "site-packages" / "token_swarm_server"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert default_cache(installed) == Path("/var/cache/me/token-swarm")
    # The XDG specification has relative paths ignored.
    for useless in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        monkeypatch.setenv("HOME", "/home/me")
        assert default_cache(installed) == Path("/home/me/.cache/token-swarm")


def test_the_examples_come_with_the_package():
    assert EXAMPLES.resolve() == ROOT / "examples"
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = [pattern.removeprefix("examples/") for pattern in packaged["token_swarm_server"] if "/" in pattern]
    matched = {path for pattern in patterns for path in EXAMPLES.glob(pattern)}
    assert matched == {path for path in EXAMPLES.rglob("*") if path.is_file()}


def test_the_example_is_valid_and_its_particle_fits_it():
    settings = load_settings(ROOT / "examples" / "demo.yaml")
    particle = Particle.load(ROOT / "examples" / "particles" / "uniform.json")
    particle.mixture.require_known(settings.experts)
    assert settings.coordinator.particles == ROOT / "examples" / "particles"
