"""The coordinator's process: connects the experts, serves SwarmService, and stops in a written order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from token_swarm.particle import Mixture, Rule
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm_server.engine import Engine
from token_swarm_server.grpc_host import GrpcHost, stop_signal
from token_swarm_server.particle_store import ParticleStore
from token_swarm_server.service import Defaults, MalformedRequests, SwarmService
from token_swarm_server.settings import PUBLIC_MESSAGE_BYTES, Settings

logger = logging.getLogger(__name__)

SERVICE = swarm_pb2.DESCRIPTOR.services_by_name["SwarmService"].full_name
GRACE_SECONDS = 10.0


class CoordinatorServer:
    """The public server over one engine, from `start` to `stop`."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        """Raises BadParameter for particles and default weights that cannot be used."""
        particles = ParticleStore.load(settings.coordinator.particles)
        self._engine = engine
        self._service = SwarmService(engine, particles, _defaults(settings, engine))
        self._host = GrpcHost(
            SERVICE,
            settings.coordinator.listen,
            field="coordinator.listen",
            max_message_bytes=PUBLIC_MESSAGE_BYTES,
            interceptors=[MalformedRequests()],
        )
        swarm_pb2_grpc.add_SwarmServiceServicer_to_server(self._service, self._host.server)

    @property
    def address(self) -> str:
        """Where it listens; with the port that was chosen once it has started."""
        return self._host.address

    async def start(self) -> None:
        """Listen. Raises BadParameter if the address is taken."""
        self._host.bind()
        await self._host.start()

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Tell the health checks, refuse new texts, let running ones end, only then leave the experts."""
        await self._host.announce_stop()
        self._service.drain()
        await self._host.server.stop(grace)
        await self._engine.close()


async def run_coordinator(
    settings: Settings, endpoints: Mapping[str, str], *, ready: Callable[[str], None] | None = None
) -> None:
    """Serve `settings.coordinator.listen` until SIGTERM or SIGINT, then drain.

    endpoints: gRPC address of each expert's process. `ready` is called with the bound address.
    Raises BadParameter for settings that the running experts contradict and for an address that cannot be bound,
    ExpertUnavailable or TransportError when an expert cannot be connected.
    """
    stop = stop_signal()
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
