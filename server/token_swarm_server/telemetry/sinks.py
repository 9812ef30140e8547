"""Everything that listens to the engine, as the settings ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from token_swarm.errors import BadParameter
from token_swarm_server.config.settings import Settings, TracingSettings
from token_swarm_server.telemetry.counts import Counts
from token_swarm_server.telemetry.logs import RequestLog
from token_swarm_server.telemetry.metrics import MetricsServer
from token_swarm_server.telemetry.observer import Observer, Sink
from token_swarm_server.telemetry.status import Link, look


class Observability(Observer):
    """An observer that counts, logs, and where it is asked for serves metrics and sends traces.

    `start` and `stop` are for the metrics' port.
    """

    def __init__(self, settings: Settings, sinks: Sequence[Sink] = ()) -> None:
        """`sinks`: more of them. Raises BadParameter where tracing is asked for and not installed."""
        self.counts = Counts(tuple(settings.experts))
        """Since this was made."""
        self.metrics: MetricsServer | None = None
        self._listen = settings.coordinator.metrics.listen
        super().__init__((self.counts, RequestLog(), *_traces(settings.coordinator.tracing), *sinks))

    def start(self, links: Mapping[str, Link]) -> None:
        """Serve metrics, if asked for. Raises BadParameter if the address is taken."""
        if self._listen is not None:
            self.metrics = MetricsServer.start(self._listen, self.counts, lambda: look(links))

    async def stop(self) -> None:
        """Close the port and end the sinks."""
        if self.metrics is not None:
            await self.metrics.stop()
            self.metrics = None
        await asyncio.to_thread(self.close)


def _traces(settings: TracingSettings) -> list[Sink]:
    if settings.endpoint is None:
        return []
    try:
        from token_swarm_server.telemetry.tracing import TraceSink, otlp_exporter

        exporter = otlp_exporter(settings.endpoint)
    except ImportError as error:
        allowed = "left out, or OpenTelemetry installed: pip install 'token-swarm[tracing]'"
        raise BadParameter("coordinator.tracing.endpoint", settings.endpoint, allowed) from error
    return [TraceSink(exporter, sample=settings.sample, service_name=settings.service_name)]
