"""`token-swarm examples`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from token_swarm_server.cli.errors import FAILURE, CliError
from token_swarm_server.config.places import EXAMPLES


def examples(
    folder: Annotated[Path, typer.Argument(help="Where to write them.")] = Path("examples"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Write the example configurations and particles into a folder.

    \b
    Examples:
      token-swarm examples
      token-swarm serve --config examples/three.yaml
    """
    files = sorted(path for path in EXAMPLES.rglob("*") if path.is_file())
    targets = {path: folder / path.relative_to(EXAMPLES) for path in files}
    if folder.exists() and folder.samefile(EXAMPLES):
        raise CliError(f"FOLDER: {folder} is where they come from; give another")
    there = [target for target in targets.values() if target.exists()]
    if there and not overwrite:
        raise CliError(f"FOLDER: {there[0]} exists; give another folder, or --overwrite")
    try:
        for path, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            print(target)
    except OSError as error:
        raise CliError(f"FOLDER: {folder} cannot be written: {error.strerror}", FAILURE) from error
