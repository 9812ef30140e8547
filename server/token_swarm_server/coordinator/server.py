"""The coordinator's process: connects the experts, serves SwarmService, and stops in a written order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Mapping

from token_swarm.errors import BadParameter
from token_swarm.kernels import native
from token_swarm.particle import Mixture, Rule
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm_server.config.settings import PUBLIC_MESSAGE_BYTES, Settings
from token_swarm_server.coordinator.engine import Engine
from token_swarm_server.coordinator.expert.link import Reviver
from token_swarm_server.coordinator.particle_store import ParticleStore
from token_swarm_server.coordinator.service import Defaults, SwarmService
from token_swarm_server.rpc.host import GrpcHost, on_signals, public_access, stop_signal
from token_swarm_server.rpc.malformed import MalformedRequests
from token_swarm_server.telemetry.sinks import Observability

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 0.5
"""For the last messages of texts that have ended to leave."""

SERVICE = swarm_pb2.DESCRIPTOR.services_by_name["SwarmService"].full_name


class CoordinatorServer:
    """The public server over one engine, from `start` to `stop`."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        """Raises BadParameter for particles, default weights and security files that cannot be used."""
        self._settings = settings.coordinator
        self._engine = engine
        particles = ParticleStore.load(self._settings.particles)
        self._service = SwarmService(engine, particles, _defaults(settings, engine))
        self._host = GrpcHost(
            SERVICE,
            self._settings.listen,
            field="coordinator.listen",
            max_message_bytes=PUBLIC_MESSAGE_BYTES,
            access=public_access(self._settings),
            interceptors=[MalformedRequests()],
        )
        swarm_pb2_grpc.add_SwarmServiceServicer_to_server(self._service, self._host.server)
        self._experts_changed = asyncio.Event()
        self._health: asyncio.Task[None] | None = None
        self._impatient = asyncio.Event()

    @property
    def address(self) -> str:
        """Where it listens; with the port that was chosen once it has started."""
        return self._host.address

    async def start(self) -> None:
        """Listen. Raises BadParameter if an address is taken."""
        self._host.bind()
        self._engine.observer.start(self._engine.links)
        self._engine.changed = self._experts_changed.set
        await self._host.start()
        self._health = asyncio.create_task(self._keep_health())

    async def _keep_health(self) -> None:
        """Health checks say SERVING while a quorum of experts takes work."""
        while True:
            await self._host.set_serving(self._engine.ready >= self._engine.quorum)
            await self._experts_changed.wait()
            self._experts_changed.clear()

    def reload(self) -> None:
        """Read the tokens and the particles again. Particles that cannot be used are logged, and the old ones stay."""
        self._host.reload()
        try:
            particles = ParticleStore.load(self._settings.particles)
        except BadParameter as error:
            logger.error("reload: the particles stay as they were: %s", error)
            return
        self._service.use_particles(particles)
        logger.info("reload: %d particles", len(particles.all()))

    async def stop(self, grace: float | None = None) -> None:
        """Tell the health checks, refuse new requests, let accepted ones end for `grace` seconds (None: as
        configured), only then leave the experts."""
        if self._health is not None:
            self._health.cancel()
            await asyncio.gather(self._health, return_exceptions=True)
        await self._host.announce_stop()
        self._service.drain()
        # Not grpc's own grace: it refuses new calls without telling when to try again, and waits for those that watch
        # the health to hang up.
        waits = {asyncio.create_task(self._service.wait_idle()), asyncio.create_task(self._impatient.wait())}
        grace = self._settings.drain_seconds if grace is None else grace
        await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await self._host.server.stop(_FLUSH_SECONDS if grace else None)
        await self._engine.close()
        await self._engine.observer.stop()

    def hurry(self) -> None:
        """End the grace of a `stop` that is under way."""
        self._impatient.set()


async def run_coordinator(
    settings: Settings,
    endpoints: Mapping[str, str],
    *,
    reviver: Reviver | None = None,
    observer: Observability | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve `settings.coordinator.listen` until SIGTERM or SIGINT, then drain; a second signal ends the draining.

    SIGHUP reads tokens and particles again. endpoints: gRPC address of each expert's process. reviver: starts those
    that hang or answer nonsense again. `ready` is called with the bound address.
    Raises BadParameter for settings that the running experts or the processor contradict and for an address that cannot
    be bound, ExpertUnavailable or TransportError when an expert cannot be connected.
    """
    stop, reload = stop_signal(), on_signals(signal.SIGHUP)
    native.library()  # loads them: a wrong setting of theirs is an error now, not of every request
    engine = await Engine.connect(endpoints, settings, reviver=reviver, observer=observer)
    try:
        server = CoordinatorServer(settings, engine)
        await server.start()
    except BaseException:
        await engine.close()
        await engine.observer.stop()
        raise
    if ready is not None:
        ready(server.address)
    reloading = asyncio.create_task(_reload_on(reload, server))
    try:
        await stop.wait()
    except asyncio.CancelledError:
        await server.stop(0.0)
        raise
    finally:
        reloading.cancel()
    stop.clear()
    logger.info("stopping: %d texts are running", engine.running)
    draining = asyncio.create_task(server.stop())
    impatient = asyncio.create_task(stop.wait())
    await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        logger.info("stopping at once")
        server.hurry()
    impatient.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await draining


async def _reload_on(signalled: asyncio.Event, server: CoordinatorServer) -> None:
    while True:
        await signalled.wait()
        signalled.clear()
        server.reload()


def _defaults(settings: Settings, engine: Engine) -> Defaults:
    coordinator = settings.coordinator
    rule = Rule(coordinator.rule)
    mixture = Mixture(coordinator.weights, rule) if coordinator.weights else engine.ensemble.uniform(rule)
    mixture.require_known(engine.ensemble.specs)
    return Defaults(mixture, coordinator.epsilon, coordinator.window, coordinator.draft_tokens, coordinator.max_seconds)
