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
    particles = ParticleStore.load(settings.coordinator.particles)
    engine = await Engine.connect(
        endpoints,
        cache=settings.cache,
        lanes=settings.coordinator.lanes_per_expert,
        max_queue=settings.coordinator.max_queue,
    )
    try:
        service = SwarmService(engine, particles, _defaults(settings, engine))
        server = grpc.aio.server(options=_OPTIONS, interceptors=[MalformedRequests()])
        swarm_pb2_grpc.add_SwarmServiceServicer_to_server(service, server)
        serving = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(serving, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = _bind(server, settings.coordinator.listen)
        await server.start()
        for name in ("", SERVICE):
            await serving.set(name, health_pb2.HealthCheckResponse.SERVING)
        if ready is not None:
            ready(address)
        await stop.wait()
        logger.info("stopping: %d texts are running", engine.running)
        # Order: tell the balancers, refuse new texts, let running ones end, only then leave the experts.
        await serving.enter_graceful_shutdown()
        service.drain()
        await server.stop(GRACE_SECONDS)
    finally:
        await engine.close()


def _defaults(settings: Settings, engine: Engine) -> Defaults:
    rule = Rule(settings.coordinator.rule)
    weights = settings.coordinator.weights
    mixture = Mixture(weights, rule) if weights else engine.ensemble.uniform(rule)
    mixture.require_known(engine.ensemble.specs)
    return Defaults(mixture, settings.coordinator.epsilon, settings.coordinator.window)


def _bind(server: grpc.aio.Server, listen: str) -> str:
    """Bind, and return the address with the real port. Raises BadParameter when it is taken or not valid."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise BadParameter("coordinator.listen", listen, "an address that is valid and not in use") from error
    if listen.startswith("unix:"):
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"
