"""The layers of the code: an import goes only downward, and a module stays small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From top to bottom. A module belongs to the first entry that its dotted name starts with.
LAYERS = (
    ("token_swarm_server.cli",),
    ("token_swarm_server.benchmark", "token_swarm_server.search"),
    ("token_swarm_server.launch", "token_swarm_server.coordinator"),
    ("token_swarm_server.expert_server",),
    ("token_swarm_server.telemetry", "token_swarm_server.expert_protocol"),
    ("token_swarm_server.rpc",),
    ("token_swarm_server.config", "token_swarm_server.assets"),
    ("token_swarm_server",),
    ("token_swarm.search.report",),
    ("token_swarm.search.run",),
    ("token_swarm.search.utilities",),
    ("token_swarm.search.optimisers", "token_swarm.search.evaluators", "token_swarm.search.score_cache"),
    ("token_swarm.search",),
    ("token_swarm.decoding",),
    ("token_swarm.mixing",),
    ("token_swarm.experts.vllm",),
    ("token_swarm.experts.transformers",),
    ("token_swarm.experts.planned",),
    ("token_swarm.experts.tokenizer",),
    ("token_swarm.experts",),
    ("token_swarm.kernels",),
    ("token_swarm.vocabulary", "token_swarm.particle"),
    ("token_swarm.rules",),
    ("token_swarm.plugins",),
    ("token_swarm.ranges",),
    ("token_swarm.errors", "token_swarm.files", "token_swarm.cores"),
    # Generated; only the server speaks it.
    ("token_swarm.v1",),
    ("token_swarm",),
)
GENERATED = "token_swarm.v1"
MAX_LINES = 400


def layer_of(module: str) -> int | None:
    """Index in LAYERS, None for a module that is not ours.

    A package hands on names of its modules, so it stands as high as the highest of them.
    """
    parent = module.rpartition(".")[0]
    for package in (module, *([parent] if module not in OWN else [])):
        if package in PACKAGES:
            return min(listed_layer(each) for each in OWN if each == package or each.startswith(f"{package}."))
    return listed_layer(module)


def listed_layer(module: str) -> int | None:
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return index
    return None


def own_modules() -> dict[str, Path]:
    found = {}
    for base in (ROOT, ROOT / "server"):
        for path in (base / ("token_swarm" if base == ROOT else "token_swarm_server")).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


OWN = own_modules()
PACKAGES = {name for name, path in OWN.items() if path.name == "__init__.py"}


def imported(source: str) -> set[str]:
    """Every module that `source` imports, also inside functions and for type checking."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names.add("." * node.level)
            else:
                # `from token_swarm import errors` names a module; `from ... import Name` does no harm here.
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def violations(module: str, source: str) -> list[str]:
    """What `source`, as the contents of `module`, imports that it may not."""
    own = layer_of(module)
    assert own is not None
    in_library = not module.startswith("token_swarm_server")
    wrong = []
    for name in sorted(imported(source)):
        layer = layer_of(name)
        if name.startswith("."):
            wrong.append(f"{module}: a relative import hides its layer")
        elif layer is not None and layer < own:
            wrong.append(f"{module} imports {name}, which is above it")
        elif in_library and name.split(".")[0] in ("grpc", "grpc_health", "grpc_status", "grpc_reflection"):
            wrong.append(f"{module} imports {name}: only the server does network I/O")
        elif in_library and name.startswith(GENERATED):
            wrong.append(f"{module} imports {name}: only the server speaks protobuf")
    return wrong


HAND_WRITTEN = {name: path for name, path in OWN.items() if not name.startswith(f"{GENERATED}.")}


@pytest.mark.parametrize("module", sorted(HAND_WRITTEN))
def test_imports_go_downward(module):
    assert violations(module, HAND_WRITTEN[module].read_text()) == []


@pytest.mark.parametrize("module", sorted(HAND_WRITTEN))
def test_a_module_stays_readable(module):
    lines = len(HAND_WRITTEN[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: split it"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("token_swarm.mixing.groups", "from token_swarm.decoding.decoder import Decoder"),
        ("token_swarm.mixing.groups", "from token_swarm import decoding"),
        ("token_swarm.kernels.eager", "import token_swarm.experts.contract"),
        ("token_swarm.errors", "from token_swarm.vocabulary import Vocabulary"),
        ("token_swarm.decoding.score", "def late():\n    from token_swarm_server.rpc.errors import QueueFull"),
        ("token_swarm.decoding.score", "from token_swarm import LocalEnsemble, Mixture"),
        ("token_swarm.mixing.groups", "from token_swarm.decoding import Decoder"),
        ("token_swarm.decoding.score", "import grpc"),
        ("token_swarm.experts.toy", "from grpc.aio import Channel"),
        ("token_swarm.experts.toy", "from token_swarm.v1 import expert_pb2"),
        ("token_swarm.experts.toy", "from . import contract"),
        ("token_swarm.experts.tokenizer.spec", "from token_swarm.experts.transformers.loading import load"),
        ("token_swarm.search.optimisers.space", "from token_swarm.search.report import plots"),
        ("token_swarm_server.benchmark.own_server", "from token_swarm_server.cli.errors import CliError"),
        ("token_swarm_server.rpc.host", "from token_swarm_server.coordinator.engine import Engine"),
    ],
)
def test_an_upward_import_is_found(module, line):
    assert violations(module, line)


def test_downward_imports_are_allowed():
    lines = (
        "import grpc",
        "from token_swarm.errors import BadParameter",
        "from token_swarm.v1 import swarm_pb2",
    )
    assert violations("token_swarm_server.coordinator.service", "\n".join(lines)) == []


def test_every_module_is_looked_at():
    assert {"token_swarm", "token_swarm.errors", "token_swarm_server.cli.serve"} <= HAND_WRITTEN.keys()
    assert all(layer_of(module) is not None for module in HAND_WRITTEN)
