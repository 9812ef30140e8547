"""What a soak sends: texts to compare, texts that are left, requests that are wrong, and how each of them ended."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from token_swarm.v1 import swarm_pb2

_TALE = """
the quick brown fox jumps over a lazy dog while seven printers in Mainz set type for an old book about the sea and its
ships and nobody knows why the clock stopped at noon def add(a, b): return a + b in 1984 there were 12 monkeys
"""
WORDS = _TALE.split()
WRONG: tuple[dict[str, Any], ...] = (
    {"prompt": "", "max_bytes": 0},
    {"particle": "no such particle"},
    {"mixture": swarm_pb2.Mixture(weights=[swarm_pb2.ExpertWeight(expert="nobody", weight=1.0)])},
    {"sampling": swarm_pb2.Sampling(temperature=-1.0)},
    {"sampling": swarm_pb2.Sampling(top_p=float("nan"))},
    {"max_bytes": 0},
    {"epsilon": 1.0},
    {"stop": [""]},
    {"prompt": "word " * 100_000},
)
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
# How often each kind is sent.
KINDS = {"greedy": 10, "cancel": 4, "deadline": 3, "wrong": 3, "sampled": 2, "fail": 1, "drop": 1, "score": 1}


@dataclass(frozen=True)
class Text:
    """What a stream gave: the text, its length in bytes of the model, and how often an expert was lost meanwhile."""

    text: str
    length: int
    reopened: int
    dropped: tuple[str, ...]

    @property
    def written(self) -> tuple[str, int]:
        """What must not change."""
        return self.text, self.length


@dataclass
class Tally:
    """What became of the requests. `problems`: one line for everything that must not happen."""

    ended: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    survived: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


class Broken(RuntimeError):
    """A stream that hangs, or ends without a finish and without an error."""


class Traffic:
    """Requests to one server. `patience`: seconds without any message after which a stream hangs."""

    def __init__(self, stub: Any, *, seed: int, max_bytes: int, prompts: int, patience: float) -> None:
        self._stub = stub
        self._max_bytes = max_bytes
        self._patience = patience
        self._seed = seed
        dice = random.Random(seed)
        self.prompts = [" ".join(dice.choices(WORDS, k=dice.randint(2, 12))) for _ in range(prompts)]
        self.references: dict[str, Text] = {}
        self.tally = Tally()

    async def refer(self, streams: int) -> None:
        """Write every greedy text alone and then in a crowd; both must be the same, before anything happens."""
        for prompt in self.prompts:
            self.references[prompt] = await self._text(self._greedy(prompt))
        queue = list(self.prompts)

        async def one() -> None:
            while queue:
                prompt = queue.pop()
                again = await self._text(self._greedy(prompt))
                if again.written != self.references[prompt].written:
                    self.tally.problems.append(f"unstable: {prompt!r} alone and in a crowd gives two texts")

        await asyncio.gather(*(one() for _ in range(streams)))

    async def stream(self, number: int, running: asyncio.Event) -> None:
        """One client, while `running` is set: a request after the other, of random kinds."""
        dice = random.Random(f"{self._seed} {number}")
        while running.is_set():
            (kind,) = dice.choices(list(KINDS), weights=list(KINDS.values()))
            try:
                ended = await getattr(self, f"_{kind}_one")(dice)
            except Broken as error:
                ended = "broken"
                self.tally.problems.append(f"broken: {kind}: {error}")
            except grpc.aio.AioRpcError as error:
                ended = error.code().name
                self.tally.problems.append(f"{kind}: {ended}: {error.details()}")
            self.tally.ended[f"{kind}: {ended}"] += 1

    def _greedy(self, prompt: str, **fields: Any) -> swarm_pb2.GenerateRequest:
        sampling = swarm_pb2.Sampling(temperature=0.0)
        return swarm_pb2.GenerateRequest(prompt=prompt, max_bytes=self._max_bytes, sampling=sampling, **fields)

    async def _next(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(self._patience):
                return await call.read()
        except TimeoutError as error:
            call.cancel()
            raise Broken(f"no message for {self._patience:g} s") from error

    async def _text(self, request: swarm_pb2.GenerateRequest, **options: Any) -> Text:
        call = self._stub.Generate(request, **options)
        text: list[str] = []
        while (message := await self._next(call)) is not grpc.aio.EOF:  # type: ignore[attr-defined]  # not in the stubs
            if message.HasField("finish"):
                finish = message.finish
                self.tally.bytes += finish.bytes
                return Text("".join(text), finish.bytes, finish.reopened, tuple(finish.dropped))
            text.append(message.chunk.text)
        raise Broken("the stream ended without a finish")

    async def _greedy_one(self, dice: random.Random) -> str:
        prompt = dice.choice(self.prompts)
        found = await self._text(self._greedy(prompt))
        self.tally.compared += 1
        self.tally.survived += found.reopened > 0
        if found.written == self.references[prompt].written:
            return "identical, reopened" if found.reopened else "identical"
        self.tally.problems.append(
            f"different: {prompt!r}, reopened {found.reopened} times: {_difference(self.references[prompt], found)}"
        )
        return "different"

    async def _cancel_one(self, dice: random.Random) -> str:
        call = self._stub.Generate(self._greedy(dice.choice(self.prompts)))
        for _ in range(dice.randint(0, 6)):
            message = await self._next(call)
            if message is grpc.aio.EOF or message.HasField("finish"):  # type: ignore[attr-defined]
                return "ended before"
        call.cancel()
        return "cancelled"

    async def _deadline_one(self, dice: random.Random) -> str:
        try:
            await self._text(self._greedy(dice.choice(self.prompts)), timeout=dice.choice((0.01, 0.1, 0.5, 1.0)))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return "DEADLINE_EXCEEDED"
            raise
        return "in time"

    async def _wrong_one(self, dice: random.Random) -> str:
        fields: dict[str, Any] = {"prompt": "the", "max_bytes": 5} | dice.choice(WRONG)
        try:
            await self._text(swarm_pb2.GenerateRequest(**fields))
        except grpc.aio.AioRpcError as error:
            if error.code() in REFUSALS:
                return error.code().name
            raise
        self.tally.problems.append(f"taken: {str(fields)[:80]} is wrong, but got a text")
        return "taken"

    async def _sampled_one(self, dice: random.Random) -> str:
        sampling = swarm_pb2.Sampling(temperature=1.0, seed=dice.getrandbits(32))
        prompt = dice.choice(self.prompts)
        await self._text(swarm_pb2.GenerateRequest(prompt=prompt, max_bytes=self._max_bytes, sampling=sampling))
        return "ended"

    async def _fail_one(self, dice: random.Random) -> str:
        policy = swarm_pb2.ON_EXPERT_FAILURE_FAIL
        try:
            await self._text(self._greedy(dice.choice(self.prompts), on_expert_failure=policy))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return "UNAVAILABLE"
            raise
        return "ended"

    async def _drop_one(self, dice: random.Random) -> str:
        policy = swarm_pb2.ON_EXPERT_FAILURE_DROP
        found = await self._text(self._greedy(dice.choice(self.prompts), on_expert_failure=policy))
        return f"without {', '.join(found.dropped)}" if found.dropped else "ended"

    async def _score_one(self, dice: random.Random) -> str:
        request = swarm_pb2.ScoreRequest(prompt=dice.choice(self.prompts), text=" ".join(dice.choices(WORDS, k=6)))
        try:
            async with asyncio.timeout(self._patience):
                await self._stub.Score(request)
        except TimeoutError as error:
            raise Broken(f"no score for {self._patience:g} s") from error
        return "scored"


def _difference(reference: Text, found: Text) -> str:
    """Where two texts part."""
    at = next((i for i, (a, b) in enumerate(zip(reference.text, found.text, strict=False)) if a != b), None)
    if at is None:
        return f"{reference.length} bytes became {found.length}"
    return f"from character {at}, {reference.text[at : at + 20]!r} became {found.text[at : at + 20]!r}"


def summary(counts: Mapping[str, int], kinds: Sequence[str] = tuple(KINDS)) -> list[tuple[str, str]]:
    """Kind and outcomes, for a table."""
    rows = []
    for kind in kinds:
        ends = {
            name.partition(": ")[2]: count for name, count in sorted(counts.items()) if name.startswith(f"{kind}: ")
        }
        if ends:
            rows.append((kind, ", ".join(f"{end} {count}" for end, count in ends.items())))
    return rows
