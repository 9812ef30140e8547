"""SwarmService: the public gRPC face of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import grpc

from token_swarm.errors import FailedPrecondition
from token_swarm.particle import Mixture
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm_server.coordinator import messages
from token_swarm_server.coordinator.engine import Engine, Finished
from token_swarm_server.coordinator.particle_store import ParticleStore
from token_swarm_server.coordinator.recovery import Prompt
from token_swarm_server.rpc.errors import DeadlineExceeded, Unavailable, abort, forget_frames
from token_swarm_server.telemetry.observer import Watch
from token_swarm_server.telemetry.status import look, status_to_proto

_logger = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

DEFAULT_MAX_BYTES = 1024
"""Length of a text whose request names no limit."""


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise. `max_seconds`: the longest life of any request."""

    mixture: Mixture
    epsilon: float
    window: int | None
    draft_tokens: int
    max_seconds: float


class SwarmService(swarm_pb2_grpc.SwarmServiceServicer):
    """The public service over one engine."""

    def __init__(self, engine: Engine, particles: ParticleStore, defaults: Defaults) -> None:
        self._engine = engine
        self._particles = particles
        self._defaults = defaults
        self._warned: set[str] = set()
        self._draining = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def use_particles(self, particles: ParticleStore) -> None:
        """Offer other particles from the next request on."""
        self._particles = particles

    def drain(self) -> None:
        """Refuse new requests from now on; accepted ones go on."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Return once no request is being served."""
        await self._idle.wait()

    async def Generate(  # type: ignore[override]  # noqa: N802 - gRPC's name; the stubs know only the generator style
        self, request: swarm_pb2.GenerateRequest, context: Context
    ) -> None:
        """Stream the continuation of a prompt."""
        try:
            with self._watch("generate", request.request_id, len(request.prompt.encode()), context) as watch:
                await _say_id(watch, context)
                async with self._serving():
                    await self._generate(request, context, watch)
        except Exception as error:  # every error becomes one status
            forget_frames(error)
            await abort(context, error)

    async def _generate(self, request: swarm_pb2.GenerateRequest, context: Context, watch: Watch) -> None:
        decode = messages.request_from_proto(
            request,
            epsilon=self._defaults.epsilon,
            window=self._defaults.window,
            draft_tokens=self._defaults.draft_tokens,
            default_max_bytes=DEFAULT_MAX_BYTES,
        )
        policy = messages.policy_from_proto(request.on_expert_failure)
        prompt = Prompt(request.prompt, request.chat, self._mixture(request), policy)
        plain = self._without_chat_template(prompt)
        async with contextlib.aclosing(self._engine.generate(prompt, decode, watch)) as events:
            async for event in events:
                # Returns once the transport takes it: a slow reader holds up its own text and nothing else.
                if isinstance(event, Finished):
                    finish = messages.finish_to_proto(event, decode)
                    finish.without_chat_template.extend(plain)
                    await context.write(swarm_pb2.GenerateResponse(finish=finish))
                else:
                    await context.write(swarm_pb2.GenerateResponse(chunk=swarm_pb2.Chunk(text=event)))

    async def Score(  # noqa: N802
        self, request: swarm_pb2.ScoreRequest, context: Context
    ) -> swarm_pb2.ScoreResponse:
        """Log-probability of a text."""
        size = len(request.prompt.encode()) + len(request.text.encode())
        try:
            with self._watch("score", request.request_id, size, context) as watch:
                await _say_id(watch, context)
                async with self._serving():
                    prompt = Prompt(request.prompt, request.chat, self._mixture(request))
                    plain = self._without_chat_template(prompt)
                    stride = request.stride if request.HasField("stride") else None
                    score = await self._engine.score(prompt, request.text, watch, stride)
                    watch.finished("scored")
                    response = messages.score_to_proto(score, per_byte=request.per_byte)
                    response.without_chat_template.extend(plain)
                    return response
        except Exception as error:  # every error becomes one status
            forget_frames(error)
            await abort(context, error)

    def _without_chat_template(self, prompt: Prompt) -> list[str]:
        """Experts of a chat that read its prompt as a text to continue; the log names each once.

        Raises FailedPrecondition where all of them would.
        """
        names = prompt.mixture.active if prompt.chat else ()
        plain = [name for name in names if not self._engine.links[name].spec.has_chat_template]
        if plain and len(plain) == len(names):
            raise FailedPrecondition(f"chat: {', '.join(plain)}: no chat template; ask without chat")
        for name in plain:
            if name not in self._warned:
                self._warned.add(name)
                _logger.warning("expert %s has no chat template: it continues the prompts of chats as text", name)
        return plain

    def _watch(self, kind: Literal["generate", "score"], given_id: str, size: int, context: Context) -> Watch:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self._engine.observer.request(
            kind, given_id, prompt_bytes=size, metadata=metadata, time_remaining=context.time_remaining()
        )

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        """Around the work of a request: not while draining, and no longer than the server allows."""
        if self._draining:
            raise Unavailable("the server is shutting down", retry_after=5.0)
        seconds = self._defaults.max_seconds
        self._active += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(f"the request took longer than this server allows, {seconds:g} s") from error
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def ListExperts(  # noqa: N802
        self, request: swarm_pb2.ListExpertsRequest, context: Context
    ) -> swarm_pb2.ListExpertsResponse:
        """The experts and the groups their vocabularies form."""
        del request, context
        ensemble = self._engine.ensemble
        group_of = {name: i for i, group in enumerate(ensemble.groups(ensemble.uniform())) for name in group.names}
        return swarm_pb2.ListExpertsResponse(
            experts=[
                messages.expert_to_proto(link, group_of[name]) for name, link in self._engine.links.items()
            ]
        )

    async def ListParticles(  # noqa: N802
        self, request: swarm_pb2.ListParticlesRequest, context: Context
    ) -> swarm_pb2.ListParticlesResponse:
        """The particles that requests may name."""
        del request, context
        return messages.particles_to_proto(self._particles.all())

    async def GetStatus(  # noqa: N802
        self, request: swarm_pb2.GetStatusRequest, context: Context
    ) -> swarm_pb2.GetStatusResponse:
        """What runs, and what happened since the start."""
        del request, context
        experts = await look(self._engine.links)
        return status_to_proto(self._engine.observer.counts, experts, draining=self._draining)

    def _mixture(self, request: swarm_pb2.GenerateRequest | swarm_pb2.ScoreRequest) -> Mixture:
        specs = self._engine.ensemble.specs
        if request.HasField("particle"):
            particle = self._particles.get(request.particle)
            particle.require_match({name: spec.vocabulary.fingerprint for name, spec in specs.items()})
            return particle.mixture
        if request.HasField("mixture"):
            mixture = messages.mixture_from_proto(request.mixture, self._defaults.mixture.rule)
            mixture.require_known(specs)
            return mixture
        return self._defaults.mixture


async def _say_id(watch: Watch, context: Context) -> None:
    """Tell the caller under which name the request is logged, also one that will be refused."""
    await context.send_initial_metadata((("x-request-id", watch.id),))
