"""What the score cache has on disk: read once, resumed, made anew when damaged, and known by what it was made of."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.laws.ensembles import LONG, NESTED
from tests.search.cached_passages import PASSAGES, Counting, build
from token_swarm.errors import BadParameter, FailedPrecondition
from token_swarm.experts.toy import ToyExpert
from token_swarm.particle import Mixture
from token_swarm.search.score_cache.cache import Detail, ExpertKey, ScoreCache, fill, filled, model_identity
from token_swarm.search.score_cache.reader import LawReader, Passage


def test_passages_of_one_prompt_share_its_forward() -> None:
    prompt, texts = "abcabcabcab" * 9, ["aab", "bcab", "cc"]
    passages = [Passage(prompt, text) for text in texts]
    together, apart = Counting(ToyExpert("e0", NESTED)), Counting(ToyExpert("e0", NESTED))
    shared = [read.laws for read in LawReader(together).read(passages)]
    single = [next(iter(LawReader(apart).read([passage]))).laws for passage in passages]
    for left, right in zip(shared, single, strict=True):
        assert np.array_equal(left, right)
    assert together.tokens < apart.tokens / 2
    assert not together.inner._held  # type: ignore[attr-defined]


def test_what_is_there_is_not_read_again(tmp_path: Path) -> None:
    expert = Counting(ToyExpert("e0", NESTED))
    calls: list[tuple[int, int]] = []
    key = fill(tmp_path, expert, PASSAGES, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, len(PASSAGES)) for done in range(1, len(PASSAGES) + 1)]
    steps = expert.steps
    assert fill(tmp_path, expert, PASSAGES) == key
    assert expert.steps == steps
    assert filled(tmp_path, PASSAGES, "e0", "") == key
    assert filled(tmp_path, PASSAGES, "e0", "other weights") is None
    assert filled(tmp_path, PASSAGES[1:], "e0", "") is None


def test_filling_resumes_where_it_stopped(tmp_path: Path) -> None:
    whole, broken = Counting(ToyExpert("e0", NESTED)), Counting(ToyExpert("e0", NESTED))
    expected = build(tmp_path / "whole", {"e0": whole}).score([Mixture({"e0": 1.0})])
    broken.fail_after = whole.steps - 3
    with pytest.raises(ConnectionError):
        fill(tmp_path / "broken", broken, PASSAGES)
    key = ExpertKey.of(broken.spec)
    assert filled(tmp_path / "broken", PASSAGES, "e0", "") is None
    with pytest.raises(FailedPrecondition, match="'e0' has not read all"):
        ScoreCache(tmp_path / "broken", [key], PASSAGES)
    again = Counting(ToyExpert("e0", NESTED))
    cache = build(tmp_path / "broken", {"e0": again})
    assert again.steps < whole.steps / 2
    assert np.array_equal(cache.score([Mixture({"e0": 1.0})]), expected)


@pytest.mark.parametrize("damage", ["cut", "garbage", "other"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    expert = ToyExpert("e0", NESTED)
    expected = build(tmp_path, {"e0": expert}).score([Mixture({"e0": 1.0})])
    first, second = sorted(tmp_path.rglob("*.safetensors"))
    if damage == "cut":
        second.write_bytes(second.read_bytes()[:-10])
    elif damage == "garbage":
        second.write_bytes(b"not a tensor")
    else:
        shutil.copyfile(first, second)
    assert np.array_equal(build(tmp_path, {"e0": expert}).score([Mixture({"e0": 1.0})]), expected)


def test_other_experts_and_other_data_have_files_of_their_own(tmp_path: Path) -> None:
    mixture = [Mixture({"e0": 1.0})]
    scores = {
        float(build(tmp_path, {"e0": ToyExpert("e0", vocabulary, seed=1)}).score(mixture)[0, 4])
        for vocabulary in (NESTED, LONG)
    }
    key = fill(tmp_path, ToyExpert("e0", NESTED, seed=2), PASSAGES, source="seed 2")
    scores.add(float(ScoreCache(tmp_path, [key], PASSAGES).score(mixture)[0, 4]))
    assert len(scores) == 3
    with pytest.raises(FailedPrecondition):
        ScoreCache(tmp_path, [key], PASSAGES[1:])
    with pytest.raises(FailedPrecondition):
        ScoreCache(tmp_path, [replace(key, dtype="torch.float16")], PASSAGES)


def test_more_detail_is_added_to_what_is_there(tmp_path: Path) -> None:
    expert = Counting(ToyExpert("e0", NESTED))
    key = fill(tmp_path, expert, PASSAGES)
    plain = ScoreCache(tmp_path, [key], PASSAGES).score([Mixture({"e0": 1.0})])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.safetensors")}
    assert filled(tmp_path, PASSAGES, "e0", "", Detail.MASSES) is None
    assert fill(tmp_path, expert, PASSAGES, detail=Detail.ROWS) == key
    assert filled(tmp_path, PASSAGES, "e0", "", Detail.ROWS) == key
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    cache = ScoreCache(tmp_path, [key], PASSAGES)
    assert np.array_equal(cache.score([Mixture({"e0": 1.0})]), plain)
    # A power of 1 by way of the rows is the expert itself.
    assert cache.score([Mixture({"e0": 1.0 + 1e-12})]) == pytest.approx(plain, abs=1e-5)


def test_rows_that_are_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match=r"logit rows of e0: '0\.00 GB'.*the limit"):
        fill(tmp_path, ToyExpert("e0", NESTED), PASSAGES, detail=Detail.ROWS, rows_limit=100)
    assert LawReader(ToyExpert("e0", NESTED)).row_bytes([Passage("", "abcabc")]) == 2 * NESTED.width * 8
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_is_known_by_its_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(3 << 20))
    first = model_identity(str(model))
    assert model_identity(str(model)) == first
    (model / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"1")
    second = model_identity(str(model))
    (model / "config.json").write_text("[]")
    assert len({first, second, model_identity(str(model)), model_identity("owner/name")}) == 4
    assert model_identity("owner/name") == "owner/name"
