"""The experts of a search: loaded in this process, or elsewhere, where they only write texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from token_swarm.cores import available_cores
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import PromptTooLong
from token_swarm.experts.contract import Expert
from token_swarm.experts.registry import DEFAULT_BACKEND, load_expert
from token_swarm.search.data import Example
from token_swarm.search.score_cache.cache import ExpertKey
from token_swarm.search.utilities import Generations, PrefixSharing, local_generate

_DEFAULTS = {"device": "cpu", "dtype": "auto", "threads": None, "max_sequences": 16, "max_context": 2048}


@dataclass(frozen=True)
class LocalExperts:
    """Experts that this process loads, and others that it starts. Can be pickled.

    models: directory or hub id by name. cache: folder of tries, scores and texts. backends: by name, where it is not
    the default one. options: of `load_expert`, by name; without `threads` the experts share this machine's cores.
    """

    models: Mapping[str, str]
    cache: Path
    backends: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def load(self, name: str, *, share: int = 1) -> Expert:
        """One expert on its backend; `share`: how many use this machine's cores together.

        Raises ExpertLoadError, and UnknownName and PluginError for the backend.
        """
        from transformers.utils import logging

        options = {**_DEFAULTS, **self.options.get(name, {})}
        options["threads"] = options["threads"] or max(1, len(available_cores()) // share)
        # Who searches says what is loaded; a bar for each model would run through it.
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            return load_expert(self.backends.get(name, DEFAULT_BACKEND), name, self.models[name], **options)
        finally:
            if bar:
                logging.enable_progress_bar()

    def dtype(self, name: str) -> str:
        """The dtype that is asked for; "auto": whatever the backend chooses."""
        return str(self.options.get(name, {}).get("dtype", "auto"))

    def generations(self, request: DecodeRequest, keys: Mapping[str, ExpertKey]) -> Generations:
        """All of them, writing texts together. Raises as `load` does."""
        experts = {name: PrefixSharing(self.load(name, share=len(self.models))) for name in self.models}
        local = LocalEnsemble(experts, self.cache / "tries")
        marks = {name: key.fingerprint for name, key in keys.items()}
        folder = self.cache / "generations"
        return Generations(local_generate(local), request, marks, folder, refuses=partial(_refuses, experts))


class WritingExperts(Protocol):
    """Experts that run elsewhere: they write texts, but cannot read the data of a score cache."""

    def keys(self) -> dict[str, ExpertKey]:
        """What tells them apart, by name. Raises UtilityUnavailable."""
        ...

    def generations(self, request: DecodeRequest, keys: Mapping[str, ExpertKey]) -> Generations:
        """All of them, writing texts together."""
        ...


def _refuses(experts: Mapping[str, Expert], example: Example) -> tuple[str, str] | None:
    """(expert, reason) of the first one that cannot read the prompt of an example and write a token after it."""
    for name, expert in experts.items():
        try:
            length = len(expert.encode(example.prompt, chat=example.chat).tokens)
        except ValueError as error:
            return name, str(error)
        if length >= expert.spec.max_context:
            return name, str(PromptTooLong(name, length, expert.spec.max_context))
    return None
