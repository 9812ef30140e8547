"""`token-swarm search`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm.errors import BadParameter
from token_swarm_server.cli import options, session
from token_swarm_server.cli.errors import FAILURE, INTERRUPTED, CliError
from token_swarm_server.cli.search_checks import check_folders, check_optimisers, check_parts
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.places import default_cache

if TYPE_CHECKING:
    from token_swarm.particle import Rule
    from token_swarm.search.run.experts import LocalExperts
    from token_swarm.search.run.run import SearchConfig
    from token_swarm.search.run.task import Preparation
    from token_swarm.search.utilities import Goal, Judging
    from token_swarm_server.search.experts import RemoteExperts

_DECODING = "Of utilities that write text: "


def search(
    utility: Annotated[
        list[str],
        typer.Option(
            help="What is maximised: loglikelihood, multiple-choice, preference, exact-match, regex, reward or judge. "
            "Repeat it, with a --data each, for the harmonic mean.",
            metavar="NAME",
        ),
    ],
    data: Annotated[list[Path], typer.Option(help="JSONL file of examples.", metavar="FILE")],
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was stopped goes on.", metavar="DIR")],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the experts, which are loaded here.", metavar="FILE")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running server, for utilities that write text, instead of --config.")
    ] = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    name: Annotated[str, typer.Option(help="Name of the particle.")] = "learned",
    particles: Annotated[
        Path | None, typer.Option(help="Also write the particle into this folder, for a server.", metavar="DIR")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="linear, log-linear, or one of another distribution.", metavar="NAME")
    ] = None,
    temperatures: Annotated[bool, typer.Option("--temperatures", help="Also learn a temperature per expert.")] = False,
    optimiser: Annotated[
        str, typer.Option(help="swarm, model-swarms, cma, nelder-mead, differential-evolution or random.")
    ] = "swarm",
    swarm_size: Annotated[int, typer.Option("--swarm-size", help="Particles.", min=1)] = 20,
    iterations: Annotated[int, typer.Option(help="Most iterations, the first one included.", min=1)] = 50,
    setting: Annotated[
        list[str] | None, typer.Option(help="Of the optimiser, such as inertia=0.5; repeatable.", metavar="KEY=N")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same particle.", min=0, max=2**63)] = 0,
    test: Annotated[float, typer.Option(help="Share of the examples that is held out; 0: none.")] = 0.5,
    limit: Annotated[int | None, typer.Option(help="Use the first N examples of each file.", min=1)] = None,
    race: Annotated[
        str | None,
        typer.Option(help="Examples after which half of the particles drop out: 25,50,100.", metavar="N,..."),
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="Optimiser to compare with in the report; repeatable.", metavar="NAME")
    ] = None,
    normalise: Annotated[str, typer.Option(help="Choices are compared by their sum, or per bytes.")] = "sum",
    temperature: Annotated[float, typer.Option(help=f"{_DECODING}0 is greedy.")] = 0.0,
    max_bytes: Annotated[int, typer.Option(help=f"{_DECODING}most bytes of each.", min=1)] = 300,
    stop: Annotated[list[str] | None, typer.Option(help=f"{_DECODING}ends one; repeatable.")] = None,
    extract: Annotated[
        str | None, typer.Option(help="Of exact-match: the answer is the last match; `number`: the last number.")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="module:function, or a sequence classifier.")] = None,
    judge: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible API.", metavar="URL")] = None,
    judge_model: Annotated[str, typer.Option(help="Model that judges.")] = "",
    judge_key: Annotated[str | None, typer.Option(help="Environment variable with its key.", metavar="NAME")] = None,
    workers: Annotated[int, typer.Option(help="Processes that evaluate; with --address: texts at a time.", min=1)] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Evaluate on a Ray cluster: its address, or `local`.", metavar="ADDRESS")
    ] = None,
    rows_limit: Annotated[
        float, typer.Option(help="Most GB of disk for the logit rows of one expert, where they are needed.", min=0)
    ] = 4.3,
    keep_undecided: Annotated[
        bool, typer.Option("--keep-undecided", help="Save a particle even if all of them scored the same.")
    ] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html with plots.")] = True,
    as_json: options.Json = False,
) -> None:
    """Learn how to mix the experts from examples.

    Each expert reads the data once; then a swarm of mixtures is scored from what they said. The folder holds the
    particle, the history, a checkpoint that a stopped search goes on from, and a report with held-out scores.

    \b
    Examples:
      token-swarm search --config examples/demo.yaml --out runs/code \\
        --utility loglikelihood --data "$(token-swarm data code)" --reference model-swarms --reference cma
      token-swarm search --config examples/demo.yaml --out runs/hellaswag --rule linear \\
        --utility multiple-choice --data "$(token-swarm data hellaswag)"
      token-swarm search --config examples/demo.yaml --out runs/gsm8k --race 25,50,100 \\
        --utility exact-match --data "$(token-swarm data gsm8k)" --extract number
      token-swarm search --address 127.0.0.1:50061 --workers 4 --out runs/helpful \\
        --utility judge --data prompts.jsonl --judge http://127.0.0.1:8000/v1 --judge-model judge
      token-swarm particles compare runs/code/particle.json runs/hellaswag/particle.json
    `token-swarm examples` writes examples/.
    """
    with _told():
        from token_swarm.search.optimisers.space import Space
        from token_swarm.search.report.measure import Measure
        from token_swarm.search.run.task import Preparation
        from token_swarm_server.cli.search_display import Display

        if (config is None) == (address is None):
            raise CliError("--config: give it (experts are loaded here) or --address (of a server that runs)")
        credentials = options.credentials(token_file, tls, tls_ca, tls_certificate, tls_key)
        goals = _goals(utility, data, limit)
        judging = _judging(normalise, temperature, max_bytes, stop, extract, reward, judge, judge_model, judge_key)
        _require_parts(goals, judging, reference or [])
        check_parts([optimiser, *(reference or ())], report=report)
        chosen = _search_config(
            name, optimiser, {"particles": swarm_size, "iterations": iterations}, setting, seed, race, keep_undecided
        )
        if not 0 <= test < 1:
            raise BadParameter("--test", test, "a share of at least 0 and below 1")
        check_folders(out, particles, name)
        measure = Measure.of(goals[0].utility if len(goals) == 1 else "harmonic")
        with Display(session.stderr_console(), measure, iterations) as display:
            experts, names, default_rule = _remote(address, credentials, workers) if address else _local(config)
            space = Space(names, _rule(rule) if rule else default_rule, temperatures)
            check_optimisers(chosen, reference or (), space)
            preparation = Preparation(
                experts, goals, space, judging, test, display.reading, display.say, int(rows_limit * 1e9)
            )
            preparation.check()
            processes = 1 if address else workers
            outcome = _run(preparation, chosen, out, particles, processes, ray, list(reference or ()), report, display)
        if as_json:
            print(json.dumps(outcome["json"]))
        else:
            _print(outcome, measure)
        _require_decided(outcome, measure, keep_undecided)


@contextmanager
def _told() -> Iterator[None]:
    """What can go wrong, as a line and an exit code. The folder keeps its checkpoint."""
    from token_swarm.experts.loading import ExpertLoadError
    from token_swarm.search.data import DataError
    from token_swarm.search.run.run import SearchFailed
    from token_swarm.search.utility import UtilityUnavailable

    try:
        yield
    except DataError as error:
        raise CliError(f"--data: {error}") from error
    except (SearchFailed, UtilityUnavailable) as error:
        raise CliError(f"{error}; the same command goes on from the last checkpoint", FAILURE) from error
    except (ExpertLoadError, ImportError) as error:
        raise CliError(str(error), FAILURE) from error
    except OSError as error:
        raise CliError(f"{error.filename or 'input/output'}: {error.strerror or error}", FAILURE) from error
    except KeyboardInterrupt:
        session.stderr_console().print("stopped; the same command goes on from the last checkpoint", highlight=False)
        raise typer.Exit(INTERRUPTED) from None


def _rule(name: str) -> Rule:
    """Raises BadParameter, and PluginError for one of another distribution."""
    from token_swarm.rules import RULES, Rule

    if name not in RULES.names():
        raise BadParameter("--rule", name, f"one of {', '.join(RULES.names())}")
    return Rule(name)


def _goals(utilities: list[str], files: list[Path], limit: int | None) -> tuple[Goal, ...]:
    from token_swarm.search.utilities import UTILITIES, Goal

    if len(utilities) != len(files):
        raise CliError(f"--data: {len(files)} files for {len(utilities)} utilities; give one --data for each --utility")
    for each in utilities:
        if each not in UTILITIES.names():
            raise BadParameter("--utility", each, f"one of {', '.join(UTILITIES.names())}")
    return tuple(Goal.load(each, path, limit) for each, path in zip(utilities, files, strict=True))


def _judging(
    normalise: str,
    temperature: float,
    max_bytes: int,
    stop: list[str] | None,
    extract: str | None,
    reward: str | None,
    judge: str | None,
    judge_model: str,
    judge_key: str | None,
) -> Judging:
    from token_swarm.decoding.request import DecodeRequest
    from token_swarm.mixing.sampling import Sampling
    from token_swarm.search.utilities import NUMBER, JudgeSettings, Judging, Normalise

    if normalise not in [each.value for each in Normalise]:
        raise BadParameter("--normalise", normalise, "sum or bytes")
    if judge is not None and not judge_model:
        raise CliError("--judge-model: is missing; name the model that --judge serves")
    return Judging(
        normalise=Normalise(normalise),
        extract=NUMBER if extract == "number" else extract,
        numeric=extract == "number",
        reward=reward,
        judge=None if judge is None else JudgeSettings(judge, judge_model, key_variable=judge_key),
        request=DecodeRequest(
            sampling=Sampling(temperature=temperature),
            max_bytes=max_bytes,
            stop=tuple(options.read_text("--stop", each).encode() for each in stop or ()),
        ),
    )


def _require_parts(goals: tuple[Goal, ...], judging: Judging, references: list[str]) -> None:
    """Refuse, before anything is loaded, a utility without what it asks, and optimisers that do not exist."""
    from token_swarm.search.optimisers.registry import OPTIMISERS

    for each in references:
        if each not in OPTIMISERS:
            raise BadParameter("--reference", each, f"one of {', '.join(OPTIMISERS)}")
    names = [goal.utility for goal in goals]
    if "judge" in names and judging.judge is None:
        raise CliError(
            "--judge: is missing; give the URL of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1"
        )
    if "reward" in names and judging.reward is None:
        raise CliError(
            "--reward: is missing; give module:function, or the directory or hub id of a sequence classifier"
        )


def _search_config(
    name: str,
    optimiser: str,
    budget: dict[str, int],
    setting: list[str] | None,
    seed: int,
    race: str | None,
    keep_undecided: bool,
) -> SearchConfig:
    from token_swarm.search.run.run import SearchConfig

    settings: dict[str, Any] = dict(budget)
    for pair in setting or ():
        key, _, text = pair.partition("=")
        try:
            settings[key] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            raise CliError(f"--setting: {pair!r} is not KEY=NUMBER, such as inertia=0.5") from None
    try:
        rungs = None if race is None else tuple(int(part) for part in race.split(","))
    except ValueError:
        raise CliError(f"--race: {race!r} is not a list of numbers such as 25,50,100") from None
    return SearchConfig(name, optimiser, settings, seed, rungs, keep_undecided)


def _local(config: Path | None) -> tuple[LocalExperts, tuple[str, ...], Rule]:
    """(experts, their names, the configuration's rule)."""
    from token_swarm.particle import Rule
    from token_swarm_server.search.experts import configured_experts

    settings = load_settings(config)
    models = session.ready_models(settings, session.stderr_console())
    return configured_experts(settings, models), tuple(models), Rule(settings.coordinator.rule)


def _remote(
    address: str, credentials: options.Credentials, concurrency: int
) -> tuple[RemoteExperts, tuple[str, ...], Rule]:
    from token_swarm.particle import Rule
    from token_swarm_server.cli.client import require_private_token
    from token_swarm_server.search.experts import RemoteExperts
    from token_swarm_server.search.remote import RemoteEnsemble

    require_private_token(address, credentials)
    server = RemoteEnsemble(address, tls=credentials.tls, token=credentials.token)
    return RemoteExperts(server, default_cache(), concurrency), tuple(server.keys()), Rule.LOG_LINEAR


def _run(
    preparation: Preparation,
    config: SearchConfig,
    out: Path,
    particles: Path | None,
    workers: int,
    ray: str | None,
    references: list[str],
    report: bool,
    display: Any,
) -> dict[str, Any]:
    from token_swarm.search.evaluators import WatchedEvaluator
    from token_swarm.search.report.comparison import make_table
    from token_swarm.search.report.report import comparison_json, notes_of, write_report
    from token_swarm.search.run.run import PARTICLE, Search
    from token_swarm.search.run.task import evaluating
    from token_swarm_server.cli.search_display import left_out_lines

    task = preparation.task(workers=workers if ray is None else max(workers, 2))
    for line in left_out_lines(task.left_out):
        display.say(line)
    with evaluating(workers, ray) as inner:
        display.searching()
        evaluator = WatchedEvaluator(inner, display.evaluating, at_once=workers)
        result = Search(task, config, out, evaluator, progress=display.iteration).run()
        table = make_table(task, config, result, evaluator, references=references, progress=display.working)
    page = write_report(out, task, result, table) if report else None
    saved = result.undecided is None or config.keep_undecided
    if particles is not None and saved:
        result.particle.save(particles / f"{result.particle.name}.json")
    document = {
        "particle": json.loads(result.particle.to_json()),
        "file": str(out / PARTICLE) if saved else None,
        "report": None if page is None else str(page),
        "iterations": result.iterations,
        "evaluations": result.evaluations,
        "examples": result.examples,
        "failures": result.failures,
        "seconds": result.seconds,
        "undecided": result.undecided,
        "left_out": [asdict(example) for example in task.left_out],
        "notes": notes_of(task),
        "comparison": comparison_json(table),
    }
    return {"json": document, "table": table, "result": result, "report": page, "task": task}


def _require_decided(outcome: dict[str, Any], measure: Any, keep: bool) -> None:
    """Raise CliError where every particle had one score: whatever is saved then was not learned."""
    result, items = outcome["result"], outcome["task"].dev.items
    if result.undecided is None:
        return
    where = "the one dev example" if items == 1 else f"the {items} dev examples"
    said = f"nothing was learned: every particle scored {measure.text(result.undecided)} ({measure.label}) on {where}"
    if not keep:
        raise CliError(f"{said}, so that none is better; no particle is saved (--keep-undecided saves one)", FAILURE)
    session.stderr_console().print(f"{said}; the particle that is saved is the first of them", highlight=False)


def _print(outcome: dict[str, Any], measure: Any) -> None:
    from rich.console import Console

    from token_swarm_server.cli.search_display import comparison_table

    console, result = Console(), outcome["result"]
    console.print(comparison_table(outcome["table"], measure))
    failed = f", {result.failures} particles failed" if result.failures else ""
    console.print(
        f"{result.iterations} iterations, {result.evaluations:,} evaluations in {result.seconds:.2f} s{failed}",
        highlight=False,
    )
    document = outcome["json"]
    if document["left_out"]:
        console.print(f"{len(document['left_out'])} examples were left out: see above", highlight=False)
    for note in document["notes"]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if document["file"] is not None:
        console.print(f"particle: {document['file']}", highlight=False, soft_wrap=True)
    if outcome["report"] is not None:
        console.print(f"report:   {outcome['report']}", highlight=False, soft_wrap=True)
