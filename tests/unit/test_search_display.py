"""What a search says while it runs where there is no terminal."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console
from token_swarm_server.cli.search_display import Display, left_out_lines

from token_swarm.search.data import LeftOutExample
from token_swarm.search.report.measure import Measure
from token_swarm.search.run.run import Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def progress(iteration: int, seconds: float) -> Progress:
    return Progress(iteration, 20 * iteration, seconds, np.zeros(20), -0.7, None, {})


def test_lines_come_every_fifteen_seconds_with_the_time_that_is_left() -> None:
    clock, file = Clock(), io.StringIO()
    with Display(Console(file=file, width=200), Measure.of("loglikelihood"), 10, clock=clock) as display:
        for done in range(1, 41):
            clock.now += 1
            display.reading("small", "texts.jsonl", done, 40)
        display.searching()
        for done in (100, 200, 300):
            clock.now += 30
            display.evaluating(done, 400)
        clock.now += 30
        display.iteration(progress(1, 120.0))
        clock.now += 20
        display.evaluating(40, 400)
        display.working("cma")
        clock.now += 20
        display.evaluating(40, 400)  # of the comparison: the search is over
    lines = file.getvalue().splitlines()
    assert lines[0] == "small reads texts.jsonl: 15 of 40 passages, about 25 s left"
    assert lines[1] == "small reads texts.jsonl: 30 of 40 passages, about 10 s left"
    assert lines[2] == "small reads texts.jsonl: 40 of 40 passages"
    assert lines[3] == "iteration 1 of at most 10: 100 of 400 evaluations of an example, at most about 20 min left"
    assert lines[5].startswith("iteration 1 of at most 10: 300 of 400")
    assert lines[6].startswith("iteration 1, 20 evaluations, 120.0 s")
    assert lines[6].endswith("at most about 18 min left")
    assert lines[7].startswith("iteration 2 of at most 10: 40 of 400")
    assert lines[8:] == ["comparing: cma"] or len(lines) == 8


def test_a_screen_of_examples_that_are_left_out_is_enough() -> None:
    examples = [LeftOutExample("a.jsonl", i, f"id{i}", "small", "too long") for i in range(13)]
    lines = left_out_lines(examples)
    assert lines[0] == "left out: a.jsonl, example 1 (id0): expert small cannot read it: too long"
    assert len(lines) == 11
    assert "3 more" in lines[-1]
