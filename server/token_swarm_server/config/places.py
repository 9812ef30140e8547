"""Where files lie that nobody named: the cache, and the examples that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
EXAMPLES = _PACKAGE / "examples"
"""Configurations and particles, as installed or in the checkout."""
DEMO_CONFIG = EXAMPLES / "demo.yaml"


def default_cache(package: Path = _PACKAGE) -> Path:
    """Folder of converted models, vocabularies, scores and logs.

    `package`: folder of this package. In a checkout it is the checkout's `.cache`, elsewhere `token-swarm` below
    `$XDG_CACHE_HOME`, by default `~/.cache` (XDG Base Directory Specification).
    """
    checkout = package.resolve().parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / "token_swarm").is_dir():
        return checkout / ".cache"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification has relative paths ignored.
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "token-swarm"
