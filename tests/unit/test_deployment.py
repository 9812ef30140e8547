"""What can be known of the image and the manifests without a container engine: their parts agree with the program."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from token_swarm_server.cli import app
from token_swarm_server.config.addresses import parse_listen
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.settings import Settings
from token_swarm_server.expert_protocol.shared_memory import SLOTS
from token_swarm_server.expert_server.process import STOP_SECONDS
from token_swarm_server.expert_server.server import SERVICE, SLOT_ROWS

from token_swarm.particle import Particle

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"token-swarm:{PROJECT['version']}"
KUBERNETES = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in DEPLOY.glob("kubernetes/*.yaml")}
COMPOSE = {name: yaml.safe_load((DEPLOY / "compose" / f"{name}.yaml").read_text()) for name in ("one", "services")}
# The oldest release that has everything the manifests use, and the newest whose schemas are at hand.
SCHEMAS = ("1.29", kubernetes_validate.latest_version())
# What is written to: HOME with .cache below it, and what Python and PyTorch keep while they run.
WRITTEN = {"/var/lib/token-swarm", "/tmp"}
SHARED_MEMORY = SLOTS * SLOT_ROWS * 262_144 * 4
"""Bytes of the segment of an expert with Gemma's vocabulary in float32."""

each_manifest = pytest.mark.parametrize("name", KUBERNETES)
each_compose = pytest.mark.parametrize("name", COMPOSE)


def parse_command(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Command and its parameters, as `token-swarm` reads `words`. Fails the test where it would refuse them."""
    group: Any = typer.main.get_command(app)
    with group.make_context("token-swarm", list(words)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        with command.make_context(name, rest, parent=context) as inner:
            return str(name), dict(inner.params)


def objects(name: str, kind: str) -> list[dict[str, Any]]:
    return [each for each in KUBERNETES[name] if each["kind"] == kind]


def pods(name: str) -> list[dict[str, Any]]:
    return [each["spec"]["template"] for each in objects(name, "Deployment")]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def config_of(name: str, tmp_path: Path) -> Settings:
    """The configuration that a manifest carries, read as the program does."""
    path = tmp_path / "swarm.yaml"
    path.write_text(objects(name, "ConfigMap")[0]["data"]["swarm.yaml"])
    return load_settings(path)


def memory(quantity: str) -> int:
    """Bytes of a Kubernetes or compose quantity of memory."""
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|m)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 2**20}[unit]


# --- Kubernetes ---------------------------------------------------------------------------------------------------


@each_manifest
@pytest.mark.parametrize("version", SCHEMAS)
def test_manifests_are_what_kubernetes_takes(name: str, version: str) -> None:
    for each in KUBERNETES[name]:
        kubernetes_validate.validate(each, version, strict=True)


def probes(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]]:
    for pod in pods(name):
        for container in containers(pod):
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                if kind in container:
                    yield pod, container, kind, container[kind]


@each_manifest
def test_every_container_runs_a_command_that_exists(name: str, tmp_path: Path) -> None:
    settings = config_of(name, tmp_path)
    served = set()
    for pod in pods(name):
        for container in containers(pod):
            command, flags = parse_command(container["args"])
            assert container["image"] == IMAGE
            if command == "expert":
                served.add(flags["name"])
                assert str(flags["threads"]) == container["resources"]["limits"]["cpu"]
            elif command == "serve":
                mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
                volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
                assert flags["config"].name in objects(name, "ConfigMap")[0]["data"]
                config = volumes[mounts[str(flags["config"].parent)]]["configMap"]["name"]
                assert config == objects(name, "ConfigMap")[0]["metadata"]["name"]
                # Every file that the configuration names lies in a volume.
                assert settings.coordinator.tls is not None
                assert settings.coordinator.tokens is not None
                assert settings.coordinator.particles is not None
                for path in (
                    settings.coordinator.tls.certificate,
                    settings.coordinator.tls.key,
                    settings.coordinator.tokens,
                    settings.coordinator.particles / "uniform.json",
                ):
                    assert str(path.parent) in mounts, path
    assert served == set(settings.experts)


@each_manifest
def test_probes_ask_what_the_program_answers(name: str) -> None:
    seen = set()
    for pod, container, kind, probe in probes(name):
        label = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        seen.add((label, container["name"], kind))
        ports = {port["containerPort"] for port in container.get("ports", ())}
        if "grpc" in probe:
            assert probe["grpc"]["port"] in ports
            assert probe["grpc"]["service"] == SERVICE
            continue
        assert probe["exec"]["command"][0] == "token-swarm"
        command, flags = parse_command(probe["exec"]["command"][1:])
        assert command == "health"
        # A server that drains or lacks an expert says NOT_SERVING, and a restart would end its texts.
        assert flags["alive"] == (kind == "livenessProbe")
        # The command gives up before the kubelet does, so that its reason is in the events.
        assert flags["timeout"] < probe["timeoutSeconds"]
        _, own = parse_command(container["args"])
        if "address" in own:
            assert flags["address"] == own["address"]
        else:
            host, _, port = flags["address"].rpartition(":")
            assert (host, int(port)) == ("localhost", next(iter(ports)))
    for pod in pods(name):
        for container in pod["spec"]["containers"]:
            label = pod["metadata"]["labels"]["app.kubernetes.io/component"]
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert (label, container["name"], kind) in seen


@each_manifest
def test_addresses_and_ports_agree(name: str, tmp_path: Path) -> None:
    settings = config_of(name, tmp_path)
    services = {each["metadata"]["name"]: each["spec"] for each in objects(name, "Service")}
    listening = parse_listen(settings.coordinator.listen)
    for service in services.values():
        (pod,) = [pod for pod in pods(name) if service["selector"].items() <= pod["metadata"]["labels"].items()]
        for port in service["ports"]:
            open_ports = [each for c in containers(pod) for each in c.get("ports", ())]
            assert port["port"] in {each["containerPort"] for each in open_ports if each["name"] == port["targetPort"]}
    assert {port["port"] for port in services["token-swarm"]["ports"]} == {listening.port}
    own = {}
    for pod in pods(name):
        for container in containers(pod):
            command, flags = parse_command(container["args"])
            if command == "expert":
                own[flags["name"]] = flags["address"]
            elif command == "health":
                assert flags["address"] in {expert.address for expert in settings.experts.values()}
    for expert, given in settings.experts.items():
        assert given.address is not None
        if given.address.startswith("unix:"):
            assert given.address == own[expert]
        else:
            host, _, port = given.address.rpartition(":")
            assert int(port) in {each["port"] for each in services[host]["ports"]}
            assert parse_listen(own[expert]).port == int(port)
            assert services[host]["selector"]["app.kubernetes.io/component"] == expert


@each_manifest
def test_texts_get_the_time_to_end(name: str, tmp_path: Path) -> None:
    drain = config_of(name, tmp_path).coordinator.drain_seconds
    for pod in pods(name):
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace > STOP_SECONDS
        for container in pod["spec"]["containers"]:
            if container["name"] == "coordinator":
                pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
                experts = len(pod["spec"].get("initContainers", ()))
                assert grace > pause + drain + experts * STOP_SECONDS


@each_manifest
def test_nothing_runs_with_more_rights_than_it_needs(name: str) -> None:
    (uid,) = set(re.findall(r"^USER (\d+):\1$", DOCKERFILE, re.MULTILINE))
    for pod in pods(name):
        shared = pod["spec"]["securityContext"]
        assert shared["runAsNonRoot"] is True
        assert {str(shared[key]) for key in ("runAsUser", "runAsGroup", "fsGroup")} == {uid}
        assert pod["spec"]["automountServiceAccountToken"] is False
        volumes = {each["name"]: each for each in pod["spec"].get("volumes", ())}
        for container in containers(pod):
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            command, flags = parse_command(container["args"])
            mounts = {each["mountPath"]: each for each in container.get("volumeMounts", ())}
            assert all(each["name"] in volumes for each in mounts.values())
            if command == "health":
                continue
            assert {path for path, each in mounts.items() if not each.get("readOnly")} >= WRITTEN
            if str(flags.get("address", "")).startswith("unix:"):
                # A folder below the volume: the expert makes it, for its user alone.
                assert str(Path(flags["address"].removeprefix("unix:")).parents[1]) in mounts
        for volume in volumes.values():
            # Readable by the group that fsGroup names, and writable by nobody: the program checks that of the tokens.
            assert volume.get("secret", {}).get("defaultMode", 0o440) == 0o440


def test_the_containers_of_one_pod_share_memory() -> None:
    (pod,) = pods("one-pod")
    (shared,) = [each for each in pod["spec"]["volumes"] if each["name"] == "shared-memory"]
    assert shared["emptyDir"]["medium"] == "Memory"
    experts = [c for c in containers(pod) if parse_command(c["args"])[0] == "expert"]
    assert memory(shared["emptyDir"]["sizeLimit"]) >= len(experts) * SHARED_MEMORY
    for container in containers(pod):
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    # An init container that stays starts before the coordinator and stops after it.
    assert all(each["restartPolicy"] == "Always" for each in pod["spec"]["initContainers"])


@each_manifest
def test_particles_of_the_manifest_are_particles(name: str, tmp_path: Path) -> None:
    settings = config_of(name, tmp_path)
    for file, text in objects(name, "ConfigMap")[1]["data"].items():
        (tmp_path / file).write_text(text)
        Particle.load(tmp_path / file).mixture.require_known(settings.experts)


def test_only_the_coordinator_reaches_the_experts() -> None:
    (policy,) = objects("services", "NetworkPolicy")
    (rule,) = policy["spec"]["ingress"]
    labels = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod["metadata"]["labels"] for pod in pods("services")
    }
    (source,) = rule["from"]
    assert source["podSelector"]["matchLabels"].items() <= labels["coordinator"].items()
    for component, given in labels.items():
        covered = policy["spec"]["podSelector"]["matchLabels"].items() <= given.items()
        assert covered == (component != "coordinator")
    assert {port["port"] for port in rule["ports"]} == {50071}


# --- Compose ------------------------------------------------------------------------------------------------------


@each_compose
def test_compose_files_are_what_compose_takes(name: str) -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    path = DEPLOY / "compose" / f"{name}.yaml"
    done = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@each_compose
def test_compose_services_agree_with_their_configuration(name: str) -> None:
    settings = load_settings(DEPLOY / "compose" / COMPOSE[name]["configs"]["swarm"]["file"])
    listening = parse_listen(settings.coordinator.listen)
    services = COMPOSE[name]["services"]
    started = {}
    for label, service in services.items():
        command, flags = parse_command(service["command"])
        assert service["image"] == IMAGE
        probe, asked = parse_command(service["healthcheck"]["test"][2:])
        assert (service["healthcheck"]["test"][:2], probe) == (["CMD", "token-swarm"], "health")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        mounts = {str(each).split(":")[1] for each in service["volumes"]} | {
            str(each).split(":")[0] for each in service["tmpfs"]
        }
        assert mounts >= WRITTEN
        if command == "expert":
            started[label] = flags["name"]
            assert asked["address"] == flags["address"].replace("0.0.0.0", "127.0.0.1")
            assert settings.experts[flags["name"]].address == f"{label}:{parse_listen(flags['address']).port}"
            assert "ports" not in service
        else:
            assert command == "serve"
            (config,) = service["configs"]
            assert str(flags["config"]) == config["target"]
            # The port has no tokens: nobody but this machine may reach it.
            assert service["ports"] == [f"127.0.0.1:{listening.port}:{listening.port}"]
            assert float(service["stop_grace_period"].removesuffix("s")) > settings.coordinator.drain_seconds + 5
            assert set(service.get("depends_on", ())) == services.keys() - {label}
    if name == "one":
        assert memory(services["swarm"]["shm_size"]) >= len(settings.experts) * SHARED_MEMORY
    else:
        assert set(started.values()) == set(settings.experts)


# --- The image ----------------------------------------------------------------------------------------------------


def test_the_dockerfile_has_no_lint() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([tool, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_dockerfile_names_exists() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert any(Path(source).is_relative_to(each) for each in allowed), f".dockerignore leaves out {source}"
    (extras,) = re.findall(r"^ARG EXTRAS=(\S*)$", DOCKERFILE, re.MULTILINE)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    (version,) = set(re.findall(r"^ARG PYTHON_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert f">={version}" in PROJECT["requires-python"]
    declared = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)", DOCKERFILE)) <= declared
    entry = yaml.safe_load(re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)[0])
    assert entry == [next(iter(PROJECT["scripts"]))]
    assert parse_command(yaml.safe_load(re.findall(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)[0]))[0] == "serve"
    probe = yaml.safe_load(re.findall(r"^HEALTHCHECK .* CMD (.+)$", DOCKERFILE, re.MULTILINE)[0])
    assert parse_command(probe[1:])[0] == "health"


# --- The page -----------------------------------------------------------------------------------------------------


def test_the_page_tells_what_the_program_takes() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert {"sh", "yaml"} <= {language for language, _ in blocks}
    commands = 0
    for language, block in blocks:
        if language == "yaml":
            assert list(yaml.safe_load_all(block))
        for line in block.replace("\\\n", " ").splitlines() if language == "sh" else ():
            words = shlex.split(line, comments=True)
            if "token-swarm" in words:
                parse_command(words[words.index("token-swarm") + 1 :])
                commands += 1
            for word in words:
                if word.startswith("deploy/"):
                    assert (ROOT / word).exists(), word
    assert commands
