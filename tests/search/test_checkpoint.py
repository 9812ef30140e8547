"""A checkpoint loses no bit, belongs to one search, and survives a disk without room."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from token_swarm.errors import BadParameter
from token_swarm.search.run.checkpoint import Checkpoint, CheckpointMismatch, Identity

IDENTITY = Identity({"a": "1" * 64, "b": "2" * 64}, "3" * 64, {"seed": 1, "race": (25, 50), "optimiser": "swarm"})


def make(**changes) -> Checkpoint:
    random = np.random.default_rng(0)
    state = {
        "x": random.standard_normal((3, 2)) / 3,
        "odd": np.array([np.nan, -np.inf, 5e-324, -0.0]),
        "counts": np.arange(4),
        "flags": np.array([True, False]),
        "random": random.bit_generator.state,
        "told": [np.array([0.1]), np.array([])],
        "worst": float("inf"),
        "step": 0.1 + 0.2,
        "nothing": None,
        "numpy": np.float64(1 / 3),
    }
    given = {"iteration": 3, "evaluations": 60, "examples": 1200, "seconds": 0.5, "history_bytes": 99}
    return replace(Checkpoint(identity=IDENTITY, optimiser=state, **given), **changes)


def test_every_bit_comes_back(tmp_path: Path) -> None:
    made = make()
    made.save(tmp_path / "checkpoint.json")
    read = Checkpoint.load(tmp_path / "checkpoint.json", IDENTITY)
    assert read is not None
    assert (read.iteration, read.evaluations, read.examples, read.history_bytes) == (3, 60, 1200, 99)
    assert read.optimiser.keys() == made.optimiser.keys()
    for key in ("x", "odd", "counts", "flags"):
        assert read.optimiser[key].dtype == made.optimiser[key].dtype
        assert read.optimiser[key].tobytes() == made.optimiser[key].tobytes()
        read.optimiser[key][...] = 0  # writable
    for key in ("random", "worst", "step", "nothing", "numpy"):
        assert read.optimiser[key] == made.optimiser[key]
    assert [told.tolist() for told in read.optimiser["told"]] == [[0.1], []]
    generator = np.random.default_rng()
    generator.bit_generator.state = read.optimiser["random"]


def test_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoint.load(tmp_path / "none.json", IDENTITY) is None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (replace(IDENTITY, experts={"a": "1" * 64, "b": "9" * 64}), ["expert 'b'", "222222222222", "999999999999"]),
        (replace(IDENTITY, experts={"a": "1" * 64}), ["expert 'b' is missing"]),
        (replace(IDENTITY, experts={**IDENTITY.experts, "c": "4"}), ["expert 'c' is new"]),
        (replace(IDENTITY, data_hash="7" * 64), ["the data", "333333333333", "777777777777"]),
        (replace(IDENTITY, config={**IDENTITY.config, "seed": 2}), ["seed was 1, now 2"]),
        (replace(IDENTITY, config={**IDENTITY.config, "race": None}), ["race was [25, 50], now None"]),
    ],
)
def test_another_search_is_refused_and_says_why(tmp_path: Path, other: Identity, says: list[str]) -> None:
    path = tmp_path / "checkpoint.json"
    make().save(path)
    with pytest.raises(CheckpointMismatch) as refusal:
        Checkpoint.load(path, other)
    assert len(refusal.value.differences) == 1
    for words in (*says, str(path)):
        assert words in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": 9}', b"\xff\xfe", b'{"format": 1, "x": 2}'])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.json"
    path.write_bytes(content)
    with pytest.raises(BadParameter, match=r"checkpoint\.json"):
        Checkpoint.load(path, IDENTITY)


def test_damaged_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.json"
    make().save(path)
    document = json.loads(path.read_text())
    document["optimiser"]["x"]["data"] = document["optimiser"]["x"]["data"][:-8]
    path.write_text(json.dumps(document))
    with pytest.raises(BadParameter, match="checkpoint of a search"):
        Checkpoint.load(path, IDENTITY)


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.search.test_run import search
from token_swarm.search.run.run import SearchFailed

folder = Path(sys.argv[1])
# From now on no file may grow beyond what the last checkpoint needed: the kernel refuses the write itself.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    search(folder).run()
except SearchFailed as error:
    print(error)
    sys.exit(7)
"""


def test_the_last_checkpoint_survives_a_disk_without_room(tmp_path: Path) -> None:
    from tests.search.test_run import Stop, search, stop_after

    whole = search(tmp_path / "whole").run()
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        search(folder, progress=stop_after(3)).run()
    before = (folder / "checkpoint.json").read_bytes()
    limit = (folder / "history.jsonl").stat().st_size + 100
    command = [sys.executable, "-c", FULL_DISK, str(folder), str(limit)]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert failed.returncode == 7, failed.stderr
    for words in ("iteration 4", "cannot be written", "iteration 3 is kept", "File too large"):
        assert words in failed.stdout
    assert (folder / "checkpoint.json").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"checkpoint.json", "history.jsonl", "config.json"}
    assert search(folder).run().particle == whole.particle
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
