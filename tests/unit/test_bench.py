"""The benchmark's own arithmetic, tables and processes; speeds are measured by `python -m bench`, never here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from token_swarm_server.benchmark.client import Sample
from token_swarm_server.benchmark.facts import config_facts, describe, machine_facts
from token_swarm_server.benchmark.latency import TOLERANCE, adds_up, breakdown
from token_swarm_server.benchmark.load import Load, Stretch, compare, parse_bounds, summarise
from token_swarm_server.benchmark.prompts import PASSAGE, prompt
from token_swarm_server.benchmark.statistics import Spread, Summary
from token_swarm_server.benchmark.tables import Table, breakdown_table, load_table
from token_swarm_server.config.loading import load_settings

from bench import __main__ as entry
from bench import check, report
from bench.compare import Round, round_ratios, tables
from bench.plots import draw_all
from bench.rivals.child import Child, ChildError
from token_swarm.errors import BadParameter
from token_swarm.v1 import swarm_pb2

ROOT = Path(__file__).parents[2]


def sample(*, first: float = 0.5, total: float = 2.5, length: int = 21, **shared: float) -> Sample:
    """A text of 21 bytes, the first of them after half a second; `shared`: parts of the breakdown."""
    parts = {f"{name}_seconds": value for name, value in shared.items()}
    experts = [
        swarm_pb2.ExpertTime(expert="a", steps=5, compute_seconds=1.0, wait_seconds=1.0),
        swarm_pb2.ExpertTime(expert="b", steps=5, compute_seconds=1.9, transport_seconds=0.1),
    ]
    message = swarm_pb2.Breakdown(experts=experts, **parts)
    timings = swarm_pb2.Timings(total_seconds=2.4, breakdown=message)
    return Sample(
        first=first,
        total=total,
        gaps=(1.0, 1.0),
        length=length,
        first_bytes=1,
        tokens={"a": 5, "b": 3},
        forwards={"a": 6, "b": 3},
        server=2.4,
        finish=swarm_pb2.Finish(timings=timings),
    )


def test_a_prompt_has_its_length_wherever_it_begins():
    assert PASSAGE.isascii()
    for seed in range(20):
        assert len(prompt(777, seed)) == 777
    assert len({prompt(64, seed) for seed in range(20)}) > 5
    assert len(prompt(9000, 1)) == 9000
    assert prompt(3, 0, "ééé") == "é"  # 4 bytes would be two letters
    with pytest.raises(BadParameter, match="prompt_bytes"):
        prompt(0, 0)


def test_times_per_byte_and_token_leave_out_the_first_piece():
    one = sample()
    assert one.per_byte == pytest.approx(0.1)
    assert one.per_token("a") == pytest.approx(0.5)
    assert one.per_token("c") is None
    assert sample(length=1).per_byte is None


def test_summaries_and_ratios():
    assert Summary.of([]) is None
    assert Summary.of([1.0, 2.0, 9.0], scale=1000) == Summary(4000.0, 2000.0, pytest.approx(8860.0))
    spread = Spread.of_ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0])
    assert (spread.median, spread.low, spread.high, spread.rounds) == (2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError, match="rounds"):
        Spread.of([])


def test_a_summary_counts_what_met_the_bounds():
    stretches = [Stretch(4.0, [sample(), sample(first=3.0, total=5.0)])]
    row = summarise(stretches, {"ttft": 1000.0, "tpot": 150.0})
    assert row["requests"] == 2
    assert row["goodput"] == pytest.approx(0.25)
    assert row["output_bytes_throughput"] == pytest.approx(10.5)
    assert row["output_token_throughput"] == {"a": 2.5, "b": 1.5}
    assert row["ttft_ms"]["mean"] == pytest.approx(1750.0)
    assert row["itl_ms"]["p99"] == pytest.approx(1000.0)
    assert "goodput" not in summarise(stretches, {})


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "speed:3", "tpot:0", "e2el:inf", ""])
def test_bounds_that_cannot_be_read_are_refused(text):
    with pytest.raises(BadParameter, match="goodput"):
        parse_bounds(text)


@pytest.mark.parametrize("options", [{}, {"concurrency": 0}, {"rate": 0.0}, {"concurrency": 1, "rate": 1.0}])
def test_loads_that_are_none_are_refused(options):
    with pytest.raises(BadParameter):
        Load(**options)


def test_the_ensemble_is_compared_round_by_round_with_the_slower_expert():
    def rounds(*totals: float) -> list[Stretch]:
        return [Stretch(total, [sample(total=total)]) for total in totals]

    found = compare(rounds(2.5, 4.5), {"a": rounds(1.5, 4.5), "b": rounds(2.5, 2.5)})
    assert found["ms_per_byte_over_slower_expert"] == {"median": 1.0, "low": 1.0, "high": 1.0, "rounds": 2}
    assert found["ms_per_byte_over"]["a"]["high"] == pytest.approx(2.0)


def test_a_breakdown_says_whether_it_adds_up():
    good, bad = sample(mix=0.3, walk=0.1), sample(mix=0.3, walk=0.1 + 2 * TOLERANCE * 2.4)
    found = breakdown([good])
    assert found is not None
    assert found["sum_over_total"] == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}
    assert found["grpc_ms"] == pytest.approx(100.0)
    assert adds_up(found)
    worse = breakdown([bad])
    assert worse is not None
    assert not adds_up(worse)
    row = {"prompt_bytes": 32, "mixture": "ensemble", "breakdown": worse}
    table = breakdown_table(row)
    assert table is not None
    assert "DO NOT ADD UP" in table.markdown()
    assert breakdown_table({**row, "breakdown": None}) is None
    silent = sample()
    silent.finish.timings.ClearField("breakdown")
    assert breakdown([silent]) is None


def test_tables_are_the_same_for_terminals_and_markdown():
    table = Table("ms [lowest]", ("name", "value"), [("x", "1 [0, 2]")], note="a note [1]")
    assert table.markdown().splitlines()[2:5] == ["| name | value |", "|---|---:|", "| x | 1 [0, 2] |"]
    assert table.rich().title == "ms \\[lowest]"
    rows = [{"load": "1 stream", "mixture": "ensemble", **summarise([Stretch(1.0, [sample()])], {})}]
    assert "2,500 / 2,500 / 2,500" in load_table({"rows": rows, "ratios": []}).markdown()


def test_facts_name_machine_versions_and_revision():
    facts = machine_facts()
    assert facts["cores"] >= 1
    assert {"torch", "grpcio", "transformers"} <= set(facts["versions"])
    assert facts["versions"]["torch"] in describe(facts)
    assert json.loads(json.dumps(facts)) == facts


def test_the_configuration_is_told_without_secrets():
    settings = load_settings(
        None, experts={"a": {"model": "demo:smollm2", "threads": 1}}, coordinator={"tokens": "/run/secret-tokens"}
    )
    told = config_facts(settings)
    assert told["experts"]["a"]["threads"] == 1
    assert told["coordinator"]["rule"] == "log-linear"
    assert "secret" not in json.dumps(told)


def a_round() -> Round:
    found = Round()
    for load in ("1 stream", "8 streams"):
        found.per_byte |= {f"ensemble, {load}": 22.0, f"alone a, {load}": 10.0, f"alone b, {load}": 20.0}
        found.wall |= {f"ensemble, {load}": 23.0, f"own forwards, {load}": 21.0, f"floor, {load}": 20.0}
    return found


def test_ratios_of_those_that_took_part():
    found = a_round()
    plain = round_ratios(found, ["a", "b"], [1, 8])
    assert plain["ensemble / floor, 8 streams"] == pytest.approx(1.15)
    assert plain["ensemble / own forwards, 8 streams"] == pytest.approx(23 / 21)
    assert plain["ensemble / slower expert alone, 1 stream"] == pytest.approx(1.1)
    assert not [name for name in plain if "genlm" in name or "lockstep" in name]
    found.per_byte |= {"lockstep, in turn": 44.0, "lockstep, a thread each": 33.0, "genlm b": 400.0}
    found.per_byte |= {"genlm on both": 440.0, "ensemble with drafts": 11.0}
    more = round_ratios(found, ["a", "b"], [1])
    assert more["lockstep / ensemble"] == pytest.approx(1.5)
    assert more["genlm b / alone"] == pytest.approx(20.0)
    assert more["genlm on both / ensemble"] == pytest.approx(20.0)
    assert more["genlm on both / ensemble with drafts"] == pytest.approx(40.0)
    spread = {"median": 1.6, "low": 1.4, "high": 1.7}
    shown = tables({"ms_per_byte": {}, "wall_ms_per_byte": {}, "ratios": {"lockstep / ensemble": spread}})[1]
    assert shown.rows == [("lockstep / ensemble", "1.60 [1.40, 1.70]", "at least 1.5", "yes")]


def test_the_guard_looks_at_medians_and_knows_its_file(tmp_path):
    samples = {"a": [1.0, 1.0, 9.0], "b": [1.2, 1.1, 1.3], "new": [5.0]}
    assert check.worse(samples, {"a": 1.0, "b": 1.0, "gone": 1.0}) == ["b"]
    assert check.worse(samples, {"b": 1.05}) == []
    assert [row[-1] for row in check.table(samples, {"a": 1.0, "b": 1.0}).rows] == ["ok", "WORSE", "new"]
    assert check.read_baselines(tmp_path / "none.json") == {}
    for ratios in check.read_baselines(check.BASELINE).values():
        assert ratios
        assert all(0 < ratio < 10 for ratio in ratios.values())


def test_the_guard_needs_a_baseline_of_such_a_processor(tmp_path, monkeypatch, capsys):
    known = tmp_path / "baseline.json"
    known.write_text(json.dumps({"AVX9000": {"a": 1.0}}))
    monkeypatch.setattr(sys, "argv", ["check", "--baseline", str(known)])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 2
    assert "(there is: AVX9000); --update makes one" in capsys.readouterr().err


def test_tables_go_between_their_markers(tmp_path):
    document = tmp_path / "note.md"
    document.write_text(
        "before\n<!-- table: ratios -->old<!-- end -->\nbetween\n<!-- table: load -->kept<!-- end -->\n"
    )
    spread = {"median": 1.6, "low": 1.4, "high": 1.7}
    compared = {"ms_per_byte": {}, "wall_ms_per_byte": {}, "ratios": {"x / y": spread}, "facts": machine_facts()}
    for _ in range(2):  # a table that is there is replaced
        assert report.write_tables({"compare": compared}, document) == ["ratios"]
        text = document.read_text()
        assert text.count("| x / y | 1.60 [1.40, 1.70] | - | - |") == 1
        assert "old" not in text
        assert "<!-- table: load -->kept<!-- end -->" in text
    document.write_text("<!-- table: nonsense --><!-- end -->")
    with pytest.raises(SystemExit, match="nonsense"):
        report.write_tables({}, document)
    markers = re.findall(r"<!-- table: (\w+) -->.*?<!-- end -->", report.DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert sorted(markers) == sorted(report.TABLES)


def test_capacity_follows_from_the_breakdown_and_the_throughput():
    broken = breakdown([sample(mix=0.021, walk=0.021)])
    latency = {"rows": [{"mixture": "ensemble", "breakdown": broken}]}
    load = {
        "max_bytes": 100,
        "rows": [{"mixture": "ensemble", "concurrency": 8, "output_bytes_throughput": 200.0, "load": "8 streams"}],
    }
    table = report.capacity_table(latency, load)
    assert table is not None
    # 42 ms of the coordinator for 21 bytes; 100 ms of transport.
    assert [row[1] for row in table.rows] == ["2,000", "500", "200", "500"]
    assert table.rows[0][2] == "6,762"
    assert report.capacity_table(latency, {"max_bytes": 100, "rows": []}) is None


def test_plots_are_drawn_from_what_there_is(tmp_path):
    row = {"prompt_bytes": 32, "mixture": "ensemble", "breakdown": breakdown([sample(mix=0.3, walk=0.1)])}
    reports = {
        "latency": {"rows": [row]},
        "load": {"rows": [{"mixture": "a", "concurrency": n, "output_bytes_throughput": 9.0 * n} for n in (1, 2)]},
        "costs": {"experts": [{"experts": 1, "ms_per_byte": {"median": 2.0, "low": 1.0, "high": 4.0}}]},
    }
    drawn = draw_all(reports, tmp_path / "figures")
    assert [path.stem for path in drawn] == ["breakdown", "throughput", "experts"]
    first = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in draw_all(reports, tmp_path / "figures")] == first


def test_every_program_is_listed_with_its_purpose():
    known = entry.programs()
    assert {"kernels", "transport", "search", "compare", "costs", "check", "report"} <= set(known)
    assert all(known.values())
    done = subprocess.run([sys.executable, "-m", "bench", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 'nonsense': no such benchmark; known: ")


def test_a_rivals_process_answers_fails_and_ends(tmp_path):
    program = tmp_path / "rival.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from bench.rivals.child import answer_commands\n"
        "def handle(command):\n"
        "    print('noise')\n"
        "    return {'twice': 2 * command['value']}\n"
        "answer_commands(handle, name='rival')\n"
    )
    child = Child("rival", [sys.executable, str(program)], threads=1)
    try:
        assert child.receive() == {"ready": True, "name": "rival"}
        assert child.call(value=21) == {"twice": 42}
        with pytest.raises(ChildError, match="rival: KeyError"):
            child.call(nothing=1)
        assert child.call(value=1) == {"twice": 2}
    finally:
        child.close()
    with pytest.raises((ChildError, ValueError)):
        child.send(value=1)


def test_a_prompt_out_of_an_empty_text_is_refused():
    with pytest.raises(BadParameter, match="text: '' is not allowed"):
        prompt(8, 0, "")
