"""The coordinator's process: connects the experts, serves SwarmService, and stops in a written order."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture, Rule
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm_server.config import Settings
from token_swarm_server.engine import Engine
from token_swarm_server.particle_store import ParticleStore
from token_swarm_server.service import Defaults, MalformedRequests, SwarmService

logger = logging.getLogger(__name__)

SERVICE = swarm_pb2.DESCRIPTOR.services_by_name["SwarmService"].full_name
MAX_MESSAGE_BYTES = 4 * 2**20
GRACE_SECONDS = 10.0
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Otherwise a second server binds the same port without an error and steals half of the connections.
    ("grpc.so_reuseport", 0),
)


class CoordinatorServer:
    """The public server over one engine, from `start` to `stop`."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        """Raises BadParameter for particles and default weights that cannot be used."""
        particles = ParticleStore.load(settings.coordinator.particles)
        self.address = settings.coordinator.listen
        self._engine = engine
        self._service = SwarmService(engine, particles, _defaults(settings, engine))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=[MalformedRequests()])
        swarm_pb2_grpc.add_SwarmServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Listen; `address` then holds the port that was chosen. Raises BadParameter if it is taken."""
        try:
            port = self._server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise BadParameter("coordinator.listen", self.address, "free to listen on") from error
        if not self.address.startswith("unix:"):
            self.address = f"{self.address.rpartition(':')[0]}:{port}"
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Tell the health checks, refuse new texts, let running ones end, only then leave the experts."""
        await self._health.enter_graceful_shutdown()
        self._service.drain()
        await self._server.stop(grace)
        await self._engine.close()


async def run_coordinator(
    settings: Settings, endpoints: Mapping[str, str], *, ready: Callable[[str], None] | None = None
) -> None:
    """Serve `settings.coordinator.listen` until SIGTERM or SIGINT, then drain.

    endpoints: gRPC address of each expert's process. `ready` is called with the bound address.
    Raises BadParameter for settings that the running experts contradict and for an address that cannot be bound,
    ExpertUnavailable or TransportError when an expert cannot be connected.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = await Engine.connect(
        endpoints,
        cache=settings.cache,
        lanes=settings.coordinator.lanes_per_expert,
        max_queue=settings.coordinator.max_queue,
    )
    try:
        server = CoordinatorServer(settings, engine)
        await server.start()
    except BaseException:
        await engine.close()
        raise
    if ready is not None:
        ready(server.address)
    await stop.wait()
    logger.info("stopping: %d texts are running", engine.running)
    await server.stop()


def _defaults(settings: Settings, engine: Engine) -> Defaults:
    rule = Rule(settings.coordinator.rule)
    weights = settings.coordinator.weights
    mixture = Mixture(weights, rule) if weights else engine.ensemble.uniform(rule)
    mixture.require_known(engine.ensemble.specs)
    return Defaults(mixture, settings.coordinator.epsilon, settings.coordinator.window)
