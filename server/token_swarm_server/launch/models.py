"""From what a configuration calls a model to what a backend can load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from token_swarm_server.assets.demo_experts import ensure_demo_experts
from token_swarm_server.config.loading import ConfigError
from token_swarm_server.config.settings import DEMO_SCHEME, HUB_ID, ExpertSettings


def resolve_models(experts: Mapping[str, ExpertSettings], cache: Path, *, console: Console) -> dict[str, str]:
    """Model directory or Hugging Face id by expert name; demo experts are fetched when missing.

    Raises ConfigError for a directory that is missing, DemoExpertsError for a demo expert that cannot be had.
    """
    models = {name: expert.model for name, expert in experts.items() if expert.model is not None}
    for name, model in models.items():
        # The backend would say so too, but only after the imports of a new process.
        if not (
            model.startswith(DEMO_SCHEME) or HUB_ID.fullmatch(model) or Path(model).expanduser().is_dir()
        ):
            raise ConfigError(f"experts.{name}.model: {model} is not a directory")
    wanted = sorted(
        {model.removeprefix(DEMO_SCHEME) for model in models.values() if model.startswith(DEMO_SCHEME)}
    )
    demo = ensure_demo_experts(cache, console=console, only=wanted) if wanted else {}
    return {
        name: str(demo[model.removeprefix(DEMO_SCHEME)].absolute())
        if model.startswith(DEMO_SCHEME)
        else model
        for name, model in models.items()
    }
