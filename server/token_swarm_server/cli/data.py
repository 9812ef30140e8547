"""`token-swarm data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from token_swarm_server.cli import options, session
from token_swarm_server.cli.errors import FAILURE, CliError
from token_swarm_server.config.places import default_cache


def data(
    name: Annotated[str | None, typer.Argument(help="Print the path of this set only.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text file to take more prose from; repeatable.", metavar="FILE")
    ] = None,
    cache: options.Cache = None,
    as_json: options.Json = False,
) -> None:
    """Make evaluation data ready for `token-swarm search`.

    Fetches HellaSwag, TruthfulQA, GSM8K and HumanEval (a few MB) the first time, and takes code and prose from the
    Python installation.

    \b
    Examples:
      token-swarm data
      token-swarm search --config examples/demo.yaml --out runs/code --utility loglikelihood \\
        --data "$(token-swarm data code)"
    """
    from token_swarm_server.assets.search_data import SETS, SearchDataError, ensure_search_data

    if name is not None and name not in SETS:
        raise CliError(f"NAME: there is no set {name}; allowed: {', '.join(SETS)}")
    for path in text or ():
        if not path.is_file():
            raise CliError(f"--text: {path} is no file")
    try:
        paths = ensure_search_data(cache or default_cache(), console=session.stderr_console(), texts=text or None)
    except SearchDataError as error:
        raise CliError(str(error), FAILURE) from error
    if as_json:
        print(json.dumps({each: str(path) for each, path in paths.items() if name in (None, each)}))
    elif name is not None:
        print(paths[name])
    else:
        for each, path in paths.items():
            print(f"{each:<16}{SETS[each]:<18}{path}")
