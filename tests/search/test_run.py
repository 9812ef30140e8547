"""The loop: it writes down what it does, goes on after anything, and ends with a particle the server can load."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.search.toys import EXPERTS, FINGERPRINTS, Here, Hills, task
from token_swarm.errors import BadParameter
from token_swarm.particle import Particle, Rule
from token_swarm.search.optimisers.registry import OPTIMISERS, make_optimiser
from token_swarm.search.optimisers.space import Space
from token_swarm.search.run.checkpoint import CheckpointMismatch
from token_swarm.search.run.racing import Race, judge
from token_swarm.search.run.run import Progress, Search, SearchConfig, SearchFailed, climb

ROOT = Path(__file__).parents[2]
SETTINGS = {"particles": 8, "iterations": 10}


class Stop(Exception):
    """Ends a search from inside, as Ctrl-C does."""


def stop_after(iterations: int):
    def progress(now: Progress) -> None:
        if now.iteration >= iterations:
            raise Stop

    return progress


def search(folder: Path, *, optimiser: str = "swarm", given=None, evaluator=None, race=None, **changes) -> Search:
    config = SearchConfig(optimiser=optimiser, settings=SETTINGS, seed=3, race=race)
    return Search(given or task(), config, folder, evaluator or Here(), **changes)


def history(folder: Path):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_search_ends_with_a_particle_that_can_be_loaded(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = search(tmp_path, progress=seen.append).run()
    particle = Particle.load(tmp_path / "particle.json")
    assert particle == result.particle
    particle.require_match(FINGERPRINTS)
    assert (particle.name, particle.utility, particle.seed, particle.data_hash) == ("learned", "hills", 3, "d" * 64)
    dev, test = Hills(), Hills(seed=1)
    assert particle.dev_score == pytest.approx(dev.evaluate([particle.mixture]).utility()[0], abs=1e-12)
    assert particle.test_score == pytest.approx(test.evaluate([particle.mixture]).utility()[0], abs=1e-12)
    # The mean of parabolas has its top at the mean of their tops.
    top = dev._tops.mean(axis=0)
    np.testing.assert_allclose([particle.mixture.weights[name] for name in EXPERTS], top, atol=1e-6)
    assert [now.iteration for now in seen] == list(range(1, result.iterations + 1))
    assert seen[-1].best == particle.dev_score
    assert all(later.best >= now.best for now, later in itertools.pairwise(seen))


def test_history_holds_every_particle_of_every_iteration(tmp_path: Path) -> None:
    result = search(tmp_path).run()
    lines = history(tmp_path)
    assert [line["iteration"] for line in lines] == list(range(1, result.iterations + 1))
    assert sum(len(line["positions"]) for line in lines) == result.evaluations
    space, dev = Space(EXPERTS), Hills()
    for line in lines:
        again = dev.evaluate(space.mixtures(np.array(line["positions"]))).utility()
        np.testing.assert_array_equal(again, line["utilities"])
    assert lines[-1]["best"] == result.particle.dev_score
    assert result.examples == result.evaluations * dev.items


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_search_that_was_stopped_goes_on_to_the_same_end(tmp_path: Path, optimiser: str) -> None:
    whole = search(tmp_path / "whole", optimiser=optimiser).run()
    stopped = tmp_path / "stopped"
    for iterations in (1, 4, 6):
        with pytest.raises(Stop):
            search(stopped, optimiser=optimiser, progress=stop_after(iterations)).run()
    # A crash between the line of history and the checkpoint leaves a line too much, or half of one.
    with (stopped / "history.jsonl").open("a") as file:
        file.write('{"iteration": 7, "posi')
    seen: list[Progress] = []
    again = search(stopped, optimiser=optimiser, progress=seen.append).run()
    assert seen[0].resumed
    assert seen[0].iteration == 6
    assert again.particle == whole.particle
    assert (again.iterations, again.evaluations) == (whole.iterations, whole.evaluations)
    assert history(stopped) == history(tmp_path / "whole")
    np.testing.assert_array_equal(again.population, whole.population)


KILLED = """
import sys, time
from pathlib import Path
from tests.search.test_run import search

def slowly(now):
    print(now.iteration, flush=True)
    time.sleep(0.05)

search(Path(sys.argv[1]), progress=slowly).run()
"""


def test_kill_9_in_the_middle_changes_no_bit_of_the_particle(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole").run()
    folder = tmp_path / "killed"
    for until in (3, 7):
        command = [sys.executable, "-c", KILLED, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= until:
                    os.kill(process.pid, signal.SIGKILL)
                    break
            assert process.wait() == -signal.SIGKILL
        assert json.loads((folder / "checkpoint.json").read_text())["iteration"] >= until
    again = search(folder).run()
    assert (folder / "particle.json").read_bytes() == (tmp_path / "whole" / "particle.json").read_bytes()
    assert again.evaluations == whole.evaluations


def test_a_finished_search_gives_its_result_again_without_searching(tmp_path: Path) -> None:
    first = search(tmp_path).run()
    given = task(test=None)
    again = search(tmp_path, given=given).run()
    assert given.dev.calls == []
    assert again.particle.mixture == first.particle.mixture


def test_a_checkpoint_of_other_experts_data_or_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        search(tmp_path, progress=stop_after(2)).run()
    kept = (tmp_path / "checkpoint.json").read_bytes()
    experts = {**task().experts, "b": "laws-of-another-b"}
    for given, says in (
        ({"given": task(experts=experts)}, "expert 'b'"),
        ({"given": task(data_hash="e" * 64)}, "the data"),
        ({"given": task(space=Space(EXPERTS, Rule.LINEAR))}, "rule was 'log-linear', now 'linear'"),
        ({"optimiser": "random"}, "optimiser was 'swarm', now 'random'"),
    ):
        with pytest.raises(CheckpointMismatch, match=says):
            search(tmp_path, **given).run()
    assert (tmp_path / "checkpoint.json").read_bytes() == kept
    assert search(tmp_path).run().iterations > 2


def test_history_that_was_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        search(tmp_path, progress=stop_after(2)).run()
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(SearchFailed, match="shorter"):
        search(tmp_path).run()


def test_particles_that_fail_are_reported_and_the_search_goes_on(tmp_path: Path) -> None:
    seen: list[Progress] = []
    evaluator = Here(lambda mixture: "weight too large" if mixture.weights["a"] > 0.8 else None)
    result = search(tmp_path, evaluator=evaluator, progress=seen.append).run()
    assert result.failures >= 1
    assert result.particle.mixture.weights["a"] <= 0.8
    failed = {reason for now in seen for reason in now.failures.values()}
    assert failed == {"weight too large"}
    first = history(tmp_path)[0]
    assert first["failures"]["0"] == "weight too large"
    assert first["utilities"][0] is None


def test_a_search_in_which_all_fail_says_why_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        search(tmp_path, progress=stop_after(3)).run()
    kept = (tmp_path / "checkpoint.json").read_bytes()
    with pytest.raises(SearchFailed, match="all 8 particles failed: no endpoint"):
        search(tmp_path, evaluator=Here(lambda mixture: "no endpoint")).run()
    assert (tmp_path / "checkpoint.json").read_bytes() == kept
    assert search(tmp_path).run().iterations > 3


def test_what_the_utility_raises_comes_through_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Unreachable(Hills):
        def evaluate(self, mixtures, items=None):
            if len(self.calls) == 4:
                raise ConnectionError("judge at http://127.0.0.1:9: gave up after 3 tries")
            return super().evaluate(mixtures, items)

    with pytest.raises(ConnectionError, match="judge"):
        search(tmp_path, given=task(dev=Unreachable())).run()
    assert json.loads((tmp_path / "checkpoint.json").read_text())["iteration"] == 4
    assert search(tmp_path).run().particle == search(tmp_path / "whole").run().particle


def test_a_particle_that_fails_on_the_test_examples_is_no_result(tmp_path: Path) -> None:
    class Broken(Hills):
        def evaluate(self, mixtures, items=None):
            scores = super().evaluate(mixtures, items)
            scores.values[:] = np.nan
            return scores

    with pytest.raises(SearchFailed, match="test examples"):
        search(tmp_path, given=task(test=Broken())).run()


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchFailed, match=r"config\.json cannot be written"):
        search(tmp_path / "file").run()


def test_config_tells_what_was_run(tmp_path: Path) -> None:
    search(tmp_path).run()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["experts"] == task().experts
    assert config["config"]["optimiser"] == "swarm"
    assert config["config"]["settings"] == SETTINGS
    assert config["config"]["utility"] == "hills"


def test_racing_spends_examples_on_the_better_half(tmp_path: Path) -> None:
    dev = Hills(200, smooth=False)
    result = search(tmp_path, given=task(dev=dev), race=(25, 50, 100)).run()
    assert dev.calls[:4] == [(8, 25), (4, 50), (2, 100), (1, 200)]
    assert result.examples == result.iterations * (8 * 25 + 4 * 25 + 2 * 50 + 1 * 100)
    assert result.particle.dev_score == dev.evaluate([result.particle.mixture]).utility()[0]


def test_a_race_compares_on_common_examples() -> None:
    """Estimates of who dropped out: in the true order, never above the winner, closer than the few examples alone."""
    dev, space = Hills(200, smooth=False, sizes=True), Space(EXPERTS)
    race = Race((25, 50, 100), 200, seed=0)
    random = np.random.default_rng(0)
    raced, alone = [], []
    for _ in range(20):
        mixtures = space.mixtures(0.3 + 0.4 * random.standard_normal((12, 3)))
        true = judge(Here(), dev, mixtures).utilities
        judged = race.judge(Here(), dev, mixtures).utilities
        winner = judged.argmax()
        assert judged[winner] == true[winner]
        raced.append(judged - true)
        few = np.sort(race._order[:25]).tolist()
        alone.append(dev.evaluate(mixtures, few).utility() - true)
    assert np.abs(raced).mean() < 0.8 * np.abs(alone).mean()


def test_a_race_survives_failures() -> None:
    race, dev, space = Race((10,), 40, seed=0), Hills(smooth=False), Space(EXPERTS)
    mixtures = space.mixtures(space.one_hot())
    judged = race.judge(Here(lambda mixture: "b fails" if mixture.weights["b"] == 1 else None), dev, mixtures)
    assert np.isnan(judged.utilities).tolist() == [False, True, False]
    assert judged.failures == {1: "b fails"}
    none = race.judge(Here(lambda mixture: "all fail"), dev, mixtures)
    assert np.isnan(none.utilities).all()
    assert len(none.failures) == 3


@pytest.mark.parametrize(("race", "says"), [((50, 25), "growing"), ((0, 25), "at least 1"), ((2.5,), "whole")])
def test_a_race_without_sense_is_refused(tmp_path: Path, race, says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        search(tmp_path, given=task(dev=Hills(smooth=False)), race=race)


def test_a_smooth_utility_is_not_raced(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="race"):
        search(tmp_path, race=(25,))


def test_a_reference_optimiser_climbs_without_a_folder() -> None:
    space, dev = Space(EXPERTS), Hills()
    found = climb(make_optimiser("cma", space, {}), space, dev, Here())
    assert found is not None
    mixture, utility, evaluations = found
    assert utility == dev.evaluate([mixture]).utility()[0]
    assert evaluations == 20 * len(dev.calls) - 20
