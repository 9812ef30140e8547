"""The experts of a search: loaded in this process, or those of a server that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter, PromptTooLong
from token_swarm.experts.contract import Expert
from token_swarm.experts.registry import load_expert
from token_swarm.search.data import Example
from token_swarm.search.score_cache.cache import ExpertKey
from token_swarm.search.utilities import Generations, PrefixSharing, local_generate
from token_swarm_server.config.cores import available_cores
from token_swarm_server.config.settings import ExpertSettings, Settings
from token_swarm_server.search.remote import RemoteEnsemble


@dataclass(frozen=True)
class LocalExperts:
    """The experts of a configuration, loaded in this process. models: what each of them loads. Can be pickled."""

    models: Mapping[str, str]
    settings: Mapping[str, ExpertSettings]
    cache: Path

    @classmethod
    def of(cls, settings: Settings, models: Mapping[str, str]) -> LocalExperts:
        """Raises BadParameter for an expert that runs elsewhere."""
        for name, each in settings.experts.items():
            if name not in models or each.model is None:
                raise BadParameter(
                    f"experts.{name}.address", each.address, "left out: the search loads its experts itself"
                )
        return cls(dict(models), dict(settings.experts), settings.cache.absolute())

    def load(self, name: str, *, share: int = 1) -> Expert:
        """One expert on its backend; `share`: how many use this machine's cores together.

        Raises ExpertLoadError, PluginError.
        """
        from transformers.utils import logging

        # Who searches says what is loaded; a bar for each model would run through it.
        logging.disable_progress_bar()
        given = self.settings[name]
        options = given.backend_options() | {"threads": given.threads or max(1, len(available_cores()) // share)}
        return load_expert(given.backend, name, self.models[name], **options)

    def generations(self, request: DecodeRequest, keys: Mapping[str, ExpertKey]) -> Generations:
        """All of them, writing texts together. Raises ExpertLoadError."""
        experts = {name: PrefixSharing(self.load(name, share=len(self.models))) for name in self.models}
        local = LocalEnsemble(experts, self.cache / "tries")
        marks = {name: key.fingerprint for name, key in keys.items()}
        folder = self.cache / "generations"
        return Generations(local_generate(local), request, marks, folder, refuses=partial(_refuses, experts))


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


@dataclass(frozen=True)
class RemoteExperts:
    """The experts of a running server, which writes `concurrency` texts at a time. cache: folder of texts."""

    server: RemoteEnsemble
    cache: Path
    concurrency: int = 1

    def generations(self, request: DecodeRequest, keys: Mapping[str, ExpertKey]) -> Generations:
        """All of them, writing texts together."""
        marks = {name: key.fingerprint for name, key in keys.items()}
        return Generations(self.server.generate, request, marks, self.cache / "generations", self.concurrency)
