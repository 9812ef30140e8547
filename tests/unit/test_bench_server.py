"""The benchmark against a real server over gRPC, with toy experts: what is counted, not how fast it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from token_swarm_server.benchmark.latency import EXPERT_PARTS, SHARED_PARTS, measure_latency
from token_swarm_server.benchmark.load import Load, run_load
from token_swarm_server.benchmark.plan import ENSEMBLE, Plan
from token_swarm_server.benchmark.sweep import measure_load, turns
from token_swarm_server.cli import main
from typer.testing import CliRunner

from tests.integration.test_coordinator import coordinator
from token_swarm.v1 import swarm_pb2

EXPERTS = ["e0", "e1"]
PLAN = Plan(prompt_bytes=6, max_bytes=24, text="abcabcaab cab", temperature=1.0)


async def test_a_latency_report_has_every_part_of_every_expert(tmp_path: Path) -> None:
    calls = []
    async with coordinator(tmp_path) as running:
        report = await measure_latency(
            running.stub, [PLAN], EXPERTS, alone=True, rounds=2, seed=0, done=lambda: calls.append(1)
        )
    assert len(calls) == 3 * 3  # two rounds and one that warms up, three mixtures
    by_mixture = {row["mixture"]: row for row in report["rows"]}
    assert set(by_mixture) == {ENSEMBLE, *EXPERTS}
    found = by_mixture[ENSEMBLE]["breakdown"]
    assert set(found["shared_ms"]) == set(SHARED_PARTS)
    assert list(found["experts_ms"]) == EXPERTS
    assert all(set(parts) == set(EXPERT_PARTS) for parts in found["experts_ms"].values())
    assert list(by_mixture["e1"]["breakdown"]["experts_ms"]) == ["e1"]
    for ratio in found["sum_over_total"].values():
        # Toy experts answer at once, so what stands between the clocks weighs more than in a real text.
        assert 0.5 < ratio <= 1.05
    assert json.loads(json.dumps(report)) == report


async def test_parts_of_a_text_are_measured_where_they_happen(tmp_path: Path) -> None:
    filtered = PLAN.request({}, 3)
    filtered.sampling.temperature, filtered.sampling.top_k = 1.0, 50
    async with coordinator(tmp_path) as running:
        stretch = await run_load(running.stub, Load(concurrency=1), [PLAN.request({}, 3), filtered], seed=0)
    for sample in stretch.samples:
        told = sample.finish.timings.breakdown
        assert {each.expert: each.steps for each in told.experts}.keys() == set(EXPERTS)
        for each in told.experts:
            assert each.steps >= 1
            assert each.transport_seconds > 0
            assert min(each.queue_seconds, each.compute_seconds, each.wait_seconds) >= 0
        for part in ("encode", "prefix_mass", "walk", "scheduling"):
            assert getattr(told, f"{part}_seconds") > 0, part
        # Forwards run while text is sent: what they hide is not counted.
        assert told.send_seconds >= 0
        assert sample.server <= sample.total
    # Experts of different vocabularies share no token law: there is one to be made only where a filter acts on it.
    plain, shaped = (sample.finish.timings.breakdown.mix_seconds for sample in stretch.samples)
    assert plain == 0
    assert shaped > 0


async def test_loads_take_turns_and_count_their_requests(tmp_path: Path) -> None:
    loads, calls = [Load(concurrency=1), Load(concurrency=2), Load(rate=200.0)], []
    async with coordinator(tmp_path) as running:
        report = await measure_load(
            running.stub, PLAN, loads, EXPERTS, alone=True, requests=3, rounds=2, seed=0, bounds={"e2el": 60_000.0},
            done=lambda: calls.append(1),
        )  # fmt: skip
    assert len(calls) == turns(PLAN, loads, EXPERTS, alone=True, requests=3, rounds=2)
    assert len(report["rows"]) == 3 * 3
    for row in report["rows"]:
        assert row["requests"] == 6
        assert row["failed"] == {}
        assert row["goodput"] == pytest.approx(row["request_throughput"])
    assert [ratio["load"] for ratio in report["ratios"]] == ["1 stream", "2 streams", "200 requests/s"]
    growth = {(row["load"], row["mixture"]): row.get("throughput_over_first") for row in report["rows"]}
    assert {load for (load, _), spread in growth.items() if spread} == {"2 streams"}
    throughput = {(row["load"], row["mixture"]): row["output_bytes_throughput"] for row in report["rows"]}
    for mixture in ("ensemble", *EXPERTS):
        ratio, spread = throughput["2 streams", mixture] / throughput["1 stream", mixture], growth["2 streams", mixture]
        assert spread["low"] * 0.9 <= ratio <= spread["high"] * 1.1


async def test_loads_that_are_refused_are_compared_with_nothing(tmp_path: Path) -> None:
    plan, loads = replace(PLAN, mixing={"particle": "nobody"}), [Load(concurrency=1), Load(concurrency=2)]
    async with coordinator(tmp_path) as running:
        report = await measure_load(
            running.stub, plan, loads, EXPERTS, alone=False, requests=2, rounds=1, seed=0, bounds={}
        )
    assert [row["failed"] for row in report["rows"]] == [{"NOT_FOUND": 2}, {"NOT_FOUND": 2}]
    assert not any("throughput_over_first" in row for row in report["rows"])


async def test_what_a_server_refuses_is_counted_by_its_status(tmp_path: Path) -> None:
    async with coordinator(tmp_path, max_queue=0) as running:
        requests = [PLAN.request({}, seed) for seed in range(24)]
        requests.append(swarm_pb2.GenerateRequest(prompt="a", particle="nobody"))
        stretch = await run_load(running.stub, Load(concurrency=25), requests, seed=0)
    assert len(stretch.samples) + len(stretch.failures) == 25
    assert {failure.code for failure in stretch.failures} <= {"RESOURCE_EXHAUSTED", "NOT_FOUND"}
    assert "NOT_FOUND" in {failure.code for failure in stretch.failures}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load", "--concurrency", "1,x"], "--concurrency: '1,x' is not a list of positive numbers"),
        (["load", "--rate", "0"], "--rate: '0' is not a list"),
        (["load", "--goodput", "speed:1"], "goodput: "),
        (["latency", "--prompt-bytes", "0"], "--prompt-bytes: '0'"),
        (["latency", "--config", "none.yaml"], "config none.yaml: cannot be read"),
        (["latency", "--config", "a.yaml", "--address", "x:1"], "--address: leave it out"),
    ],
)
def test_bad_flags_are_one_line(arguments, message, capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["token-swarm", "bench", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_shows_examples():
    from token_swarm_server.cli import app

    for name in ("load", "latency"):
        assert "token-swarm bench" in CliRunner().invoke(app, ["bench", name, "--help"]).stdout
