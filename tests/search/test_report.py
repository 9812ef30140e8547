"""The report: everything in one file, the pictures beside it, and the figures it states."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.search.toys import EXPERTS, Here, Hills, task
from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture, Particle, Rule
from token_swarm.search.optimisers.space import Space
from token_swarm.search.report.comparison import make_table
from token_swarm.search.report.plots import History
from token_swarm.search.report.report import write_report
from token_swarm.search.run.run import Search, SearchConfig
from token_swarm.search.run.subset import Subset
from token_swarm.search.utility import Scores, as_items

PNG = b"\x89PNG\r\n\x1a\n"
REFERENCES = ("model-swarms", "random")


class Choices(Hills):
    """Four choices an item, which the experts weigh differently."""

    name = "multiple-choice"

    def __init__(self, items: int = 60, seed: int = 0) -> None:
        super().__init__(items, seed, smooth=False)
        random = np.random.default_rng([seed, 1])
        self._margins = random.standard_normal((3, items, 4))
        self._margins[:, :, 0] += np.array([0.9, 0.6, 0.3])[:, None]

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        chosen = as_items(items, self.items)
        points = np.array([[mixture.weights[name] for name in EXPERTS] for mixture in mixtures])
        answers = np.tensordot(points, self._margins[:, chosen], axes=1).argmax(axis=2)
        return Scores((answers == 0).astype(float), np.ones(len(chosen)))


class Likelihood(Hills):
    name = "loglikelihood"


def report(folder: Path, given, *, evaluator=None, name: str = "learned"):
    config = SearchConfig(name=name, settings={"particles": 8, "iterations": 8}, seed=1)
    evaluator = evaluator or Here()
    result = Search(given, config, folder, evaluator).run()
    table = make_table(given, config, result, evaluator, references=REFERENCES)
    return write_report(folder, given, result, table), result, table


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory):
    """(folder, table) of a report that several tests read."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, report(folder, task())[2]


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory):
    """(folder, test utility, result, table) of a report on an accuracy."""
    folder, test = tmp_path_factory.mktemp("choices"), Choices(seed=1)
    _, result, table = report(folder, task(dev=Choices(), test=test, space=Space(EXPERTS, Rule.LINEAR)))
    return folder, test, result, table


class Page(HTMLParser):
    """Rows of the first table, sources of images, and every tag that loads something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.loads: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        if tag == "img":
            self.sources.append(given["src"])
        elif tag in ("script", "link", "iframe") or "src" in given or "href" in given:
            self.loads.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self._open.append(tag)

    def handle_endtag(self, tag) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data) -> None:
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data + " "


def test_a_report_of_a_likelihood(tmp_path: Path) -> None:
    given = task(dev=Likelihood(sizes=True), test=Likelihood(seed=1, sizes=True))
    path, result, table = report(tmp_path, given)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == []
    names = [row[0].strip() for row in page.rows if row]
    for name in ("learned", *EXPERTS, "uniform", *REFERENCES):
        assert name in names
    learned = table.rows[0]
    assert learned.dev.value == pytest.approx(result.particle.dev_score, abs=1e-12)
    assert f"{-learned.test.value / np.log(2):.4f}" in text
    assert all(row.dev.low <= row.dev.value <= row.dev.high for row in table.rows)
    assert learned.against_best.difference.value == pytest.approx(
        learned.test.value - next(row for row in table.rows if row.name == table.best_expert).test.value
    )
    verdict = "better than" if learned.against_best.p_value < 0.05 else "not distinguishable from"
    assert f"That is {verdict} the best single expert on dev, {table.best_expert}" in text
    for fact in (given.data_hash, "laws-of-b", '"particles": 8'):
        assert fact in text.replace("&quot;", '"')


def test_pictures_are_files_and_in_the_page(choices) -> None:
    folder = choices[0]
    sources = Page((folder / "report.html").read_text(encoding="utf-8")).sources
    files = {"scores.png", "dynamics.png", "trajectories.png", "emergence.png"}
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources}
    assert embedded == {(folder / name).read_bytes() for name in files}
    assert all(png.startswith(PNG) and len(png) > 5000 for png in embedded)
    assert {file.name for file in folder.glob("*.png")} == files


def test_emergence_counts_the_test_examples(choices) -> None:
    folder, test, result, table = choices
    assert table.on_test
    assert table.emergence.shape == (4, 4)
    assert table.emergence.sum() == test.items
    space = Space(EXPERTS, Rule.LINEAR)
    singles = test.evaluate(space.mixtures(space.one_hot())).values
    learned = test.evaluate([result.particle.mixture]).values[0]
    nobody = singles.max(axis=0) == 0
    assert (table.gained, table.nobody) == (int(learned[nobody].sum()), int(nobody.sum()))
    assert table.emergence[0].sum() == nobody.sum()
    assert f"{table.gained} of the {table.nobody} examples" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_table_is_there_for_machines(plain) -> None:
    folder, table = plain
    document = json.loads((folder / "comparison.json").read_text())
    assert [row["name"] for row in document["rows"]] == [row.name for row in table.rows]
    assert document["rows"][0]["mixture"]["rule"] == "log-linear"
    assert document["rows"][0]["dev"]["value"] == table.rows[0].dev.value
    assert document["best_expert"] == table.best_expert
    assert document["emergence"] is None


def test_the_best_expert_is_chosen_on_dev_and_compared_on_test(plain) -> None:
    _, table = plain
    singles = [row for row in table.rows if row.kind == "expert"]
    assert table.best_expert == max(singles, key=lambda row: row.dev.value).name
    assert [row.name for row in table.rows if row.against_best is None] == [table.best_expert]


def test_names_failures_and_temperatures_are_told(tmp_path: Path) -> None:
    class Warm(Hills):
        def evaluate(self, mixtures, items=None):
            scores = super().evaluate(mixtures, items)
            cold = [[abs(mixture.temperatures["a"] - 1.5)] for mixture in mixtures]
            return Scores(scores.values - np.array(cold), scores.weights)

    given = task(space=Space(EXPERTS, Rule.LINEAR, temperatures=True), dev=Warm(), test=None)
    evaluator = Here(lambda mixture: "too hot" if mixture.temperatures["b"] > 1.2 else None)
    name = "<script>alert('x')</script>"
    path, result, table = report(tmp_path, given, evaluator=evaluator, name=name)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert result.failures > 0
    assert f"{result.failures} particles failed" in text
    assert re.search(r"temperature [\d.]+", text)
    assert Particle.load(tmp_path / "particle.json").mixture.temperatures == result.particle.mixture.temperatures
    # Without test examples dev is compared.
    assert not table.on_test
    assert all(row.test is None for row in table.rows)
    assert "on dev" in text


def test_both_halves_of_a_cache_are_one_utility() -> None:
    whole = Hills(20)
    half = Subset(whole, (3, 5, 7, 11))
    mixtures = Space(EXPERTS).mixtures(np.eye(3))
    np.testing.assert_array_equal(half.evaluate(mixtures).values, whole.evaluate(mixtures).values[:, [3, 5, 7, 11]])
    np.testing.assert_array_equal(half.evaluate(mixtures, [2, 0]).values, whole.evaluate(mixtures, [7, 3]).values)
    assert (half.name, half.items, half.smooth) == ("hills", 4, True)
    with pytest.raises(BadParameter, match="at least one"):
        Subset(whole, ())
    with pytest.raises(IndexError):
        Subset(whole, (20,))


def test_a_history_without_any_utility_is_refused() -> None:
    line = {"iteration": 1, "positions": [[1.0]], "utilities": [None], "best": None, "best_position": None}
    with pytest.raises(BadParameter, match="history"):
        History.of([line])
