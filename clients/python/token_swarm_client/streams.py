"""Text as it comes, and how it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self

import grpc

from token_swarm_client._v1 import swarm_pb2
from token_swarm_client.errors import SwarmError, error_of


class _Ending:
    def __init__(self) -> None:
        self._finish: swarm_pb2.Finish | None = None

    @property
    def finish(self) -> swarm_pb2.Finish:
        """Why the text ended and what it took. Raises RuntimeError before the end."""
        if self._finish is None:
            raise RuntimeError("the text has not ended: read the stream to its end first")
        return self._finish

    def _taken(self, response: swarm_pb2.GenerateResponse) -> str:
        """The text of a response; keeps the finish."""
        if response.HasField("finish"):
            self._finish = response.finish
        return response.chunk.text

    def _ended(self) -> None:
        if self._finish is None:
            raise SwarmError("INTERNAL", "the server ended the stream without a final message")


class TextStream(_Ending, Iterator[str]):
    """An iterator over pieces of text, whole code points each. Raises SwarmError.

    `close`, or leaving it as a context manager, cancels a request that has not ended.
    """

    def __init__(self, call: grpc.CallIterator[swarm_pb2.GenerateResponse]) -> None:
        super().__init__()
        self._call = call

    def __next__(self) -> str:
        try:
            for response in self._call:
                if text := self._taken(response):
                    return text
        except grpc.RpcError as error:
            raise error_of(error) from error
        self._ended()
        raise StopIteration

    def text(self) -> str:
        """What is left of the text, read to its end. Raises SwarmError."""
        return "".join(self)

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        self._call.cancel()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._call.cancel()  # type: ignore[no-untyped-call]


class AsyncTextStream(_Ending, AsyncIterator[str]):
    """`TextStream` for asyncio."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[swarm_pb2.GenerateRequest, swarm_pb2.GenerateResponse]) -> None:
        super().__init__()
        self._call = call
        self._responses = call.__aiter__()

    async def __anext__(self) -> str:
        try:
            async for response in self._responses:
                if text := self._taken(response):
                    return text
        except grpc.RpcError as error:
            raise error_of(error) from error
        self._ended()
        raise StopAsyncIteration

    async def text(self) -> str:
        """What is left of the text, read to its end. Raises SwarmError."""
        return "".join([piece async for piece in self])

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()
