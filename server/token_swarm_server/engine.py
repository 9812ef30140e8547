"""Runs decoders and scorers against remote experts: the coordinator without its gRPC face."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from token_swarm.decoding.decoder import Decoder, Finish
from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.forwards import Calls, Outcome
from token_swarm.decoding.request import DecodeRequest
from token_swarm.decoding.score import Score, Scorer, scored_text
from token_swarm.errors import BadParameter
from token_swarm.experts.contract import Close, EncodedPrompt
from token_swarm.mixing.groups import Unit
from token_swarm.particle import Mixture
from token_swarm_server.admission import Admission
from token_swarm_server.batching import ExpertScheduler
from token_swarm_server.expert_client import ExpertConnection


@dataclass(frozen=True)
class Finished:
    """The end of a text. Times in seconds; `first_byte` is None when no text was shown."""

    finish: Finish
    unit: Unit
    queue: float
    first_byte: float | None
    total: float


class Engine:
    """Experts, their batching schedulers and the admission to their KV."""

    def __init__(
        self, connections: Mapping[str, ExpertConnection], ensemble: Ensemble, *, lanes: int, max_queue: int
    ) -> None:
        self.ensemble = ensemble
        self.connections = dict(connections)
        self.schedulers = {name: ExpertScheduler(connection) for name, connection in connections.items()}
        self._lanes = lanes
        sequences = {name: spec.max_sequences for name, spec in ensemble.specs.items()}
        for name, count in sequences.items():
            if count < lanes:
                raise BadParameter(f"experts.{name}.max_sequences", count, f"at least lanes_per_expert = {lanes}")
        self.admission = Admission(sequences, max_queue)
        self.running = 0

    @classmethod
    async def connect(
        cls, endpoints: Mapping[str, str], *, cache: Path, lanes: int, max_queue: int, wait_seconds: float = 60.0
    ) -> Engine:
        """Connect to every expert at once. Raises ExpertUnavailable or TransportError, and leaves no connection."""
        tasks = {
            name: asyncio.ensure_future(
                ExpertConnection.connect(address, name, cache=cache / "vocabularies", wait_seconds=wait_seconds)
            )
            for name, address in endpoints.items()
        }
        try:
            connections = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        except BaseException:
            for task in tasks.values():
                task.cancel()
            for result in await asyncio.gather(*tasks.values(), return_exceptions=True):
                if isinstance(result, ExpertConnection):
                    await result.close()
            raise
        specs = {name: connection.spec for name, connection in connections.items()}
        ensemble = await asyncio.to_thread(Ensemble.of, specs, cache / "tries")
        return cls(connections, ensemble, lanes=lanes, max_queue=max_queue)

    async def generate(
        self, prompt: str, chat: bool, mixture: Mixture, request: DecodeRequest
    ) -> AsyncIterator[str | Finished]:
        """Text as it becomes complete, then one `Finished`. However it is left, the KV is freed.

        Raises BadParameter, UnknownName, QueueFull, ExpertUnavailable, ExpertFault.
        """
        arrived = time.perf_counter()
        prompts = await self._encode(mixture, prompt, chat=chat)
        # The first union of a set of vocabularies takes a second to map them: the other streams go on.
        build = partial(self.ensemble.unit, mixture, request, prompts)
        unit = await asyncio.to_thread(build) if request.unit is Unit.UNION else build()
        decoder = Decoder(unit, request, allocate=self._allocate, lanes_per_expert=self._lanes)
        first_byte: float | None = None
        async with self.admission.hold(mixture.active.keys(), self._lanes):
            admitted = time.perf_counter()
            self.running += 1
            try:
                while not decoder.finished:
                    if calls := decoder.calls():
                        decoder.resume(await self._run(calls))
                    if text := decoder.take_text():
                        first_byte = first_byte or time.perf_counter() - arrived
                        yield text
            finally:
                self.running -= 1
                self._release(decoder.close())
        total = time.perf_counter() - arrived
        yield Finished(decoder.finish, unit.kind, admitted - arrived, first_byte, total)

    async def score(self, prompt: str, text: str, chat: bool, mixture: Mixture) -> Score:
        """Log-probability of `text` after `prompt`. Raises as `generate` does."""
        prompts = await self._encode(mixture, prompt, chat=chat)
        specs = self.ensemble.specs
        pieces = await asyncio.gather(
            *(
                self.connections[name].tokenize(scored_text(specs[name], encoded, text)[1])
                for name, encoded in prompts.items()
            )
        )
        tokens = dict(zip(prompts, pieces, strict=True))
        scorer = Scorer(self.ensemble, mixture, prompts, text, tokens, self._allocate)
        async with self.admission.hold(mixture.active.keys(), 1):
            try:
                while calls := scorer.calls():
                    scorer.resume(await self._run(calls))
                    # Scoring computes for long between forwards: let the streams have their turn.
                    await asyncio.sleep(0)
            finally:
                self._release(scorer.close())
        return scorer.score

    async def close(self) -> None:
        """Disconnect from every expert; running texts fail."""
        for scheduler in self.schedulers.values():
            await scheduler.close()
        for connection in self.connections.values():
            await connection.close()

    async def _encode(self, mixture: Mixture, prompt: str, *, chat: bool) -> dict[str, EncodedPrompt]:
        mixture.require_known(self.connections)
        names = list(mixture.active)
        encoded = await asyncio.gather(*(self.connections[name].encode(prompt, chat=chat) for name in names))
        return dict(zip(names, encoded, strict=True))

    def _allocate(self, expert: str) -> int:
        return self.schedulers[expert].allocate_sequence()

    async def _run(self, calls: Calls) -> dict[str, list[Outcome]]:
        """One step on every expert, all at the same time."""
        results = await asyncio.gather(*(self.schedulers[name].submit(ops) for name, ops in calls.items()))
        return dict(zip(calls, results, strict=True))

    def _release(self, calls: Calls) -> None:
        for name, ops in calls.items():
            self.schedulers[name].release(op.sequence for op in ops if isinstance(op, Close))
