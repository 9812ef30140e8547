"""The experts of a search as the command line names them: those of a configuration, or of a server that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.search.run.experts import LocalExperts
from token_swarm.search.score_cache.cache import ExpertKey
from token_swarm.search.utilities import Generations
from token_swarm_server.config.settings import Settings
from token_swarm_server.search.remote import RemoteEnsemble


def configured_experts(settings: Settings, models: Mapping[str, str]) -> LocalExperts:
    """The experts of a configuration, loaded in this process. models: what each of them loads.

    Raises BadParameter for an expert that runs elsewhere.
    """
    for name, each in settings.experts.items():
        if name not in models or each.model is None:
            raise BadParameter(
                f"experts.{name}.address", each.address, "left out: the search loads its experts itself"
            )
    return LocalExperts(
        dict(models),
        settings.cache.absolute(),
        {name: each.backend for name, each in settings.experts.items()},
        {name: each.backend_options() for name, each in settings.experts.items()},
    )


@dataclass(frozen=True)
class RemoteExperts:
    """The experts of a running server, which writes `concurrency` texts at a time. cache: folder of texts."""

    server: RemoteEnsemble
    cache: Path
    concurrency: int = 1

    def keys(self) -> dict[str, ExpertKey]:
        """See `RemoteEnsemble.keys`."""
        return self.server.keys()

    def generations(self, request: DecodeRequest, keys: Mapping[str, ExpertKey]) -> Generations:
        """All of them, writing texts together."""
        marks = {name: key.fingerprint for name, key in keys.items()}
        return Generations(self.server.generate, request, marks, self.cache / "generations", self.concurrency)
