"""One request as its client sees it: when each piece of text came, and what the server says of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from token_swarm.v1 import swarm_pb2

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2_grpc


@dataclass(frozen=True)
class Sample:
    """An answered request. Times in seconds.

    first: until the first text came, None when the text is empty; total: until the stream ended; gaps: between two
    pieces of text. first_bytes: length of the first piece. tokens, forwards: of each expert. server: the server's own
    total, from arrival to finish.
    """

    first: float | None
    total: float
    gaps: tuple[float, ...]
    length: int
    first_bytes: int
    tokens: Mapping[str, int]
    forwards: Mapping[str, int]
    server: float
    finish: swarm_pb2.Finish

    @property
    def per_byte(self) -> float | None:
        """Seconds per byte after the first piece of text; None when there was only one piece."""
        rest = self.length - self.first_bytes
        return None if self.first is None or rest <= 0 else (self.total - self.first) / rest

    def per_token(self, expert: str) -> float | None:
        """Seconds per token of one expert's own tokenization, after the first; None for a text of one token."""
        count = self.tokens.get(expert, 0)
        return None if self.first is None or count < 2 else (self.total - self.first) / (count - 1)


@dataclass(frozen=True)
class Failure:
    """A request that the server refused or broke off."""

    code: str
    details: str


async def measure(stub: swarm_pb2_grpc.SwarmServiceAsyncStub, request: swarm_pb2.GenerateRequest) -> Sample | Failure:
    """Send one request and read its stream to the end."""
    pieces: list[tuple[float, int]] = []
    finish: swarm_pb2.Finish | None = None
    sent = time.perf_counter()
    try:
        async for response in stub.Generate(request):
            if response.WhichOneof("event") == "finish":
                finish = response.finish
            else:
                pieces.append((time.perf_counter(), len(response.chunk.text.encode())))
    except grpc.aio.AioRpcError as error:
        return Failure(error.code().name, error.details() or "")
    if finish is None:
        return Failure("UNKNOWN", "the stream ended without a final message")
    total = time.perf_counter() - sent
    times = [at for at, _ in pieces]
    return Sample(
        first=times[0] - sent if times else None,
        total=total,
        gaps=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
        length=sum(size for _, size in pieces),
        first_bytes=pieces[0][1] if pieces else 0,
        tokens={use.expert: use.tokens for use in finish.experts},
        forwards={use.expert: use.forwards for use in finish.experts},
        server=finish.timings.total_seconds,
        finish=finish,
    )
