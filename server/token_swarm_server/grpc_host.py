"""What every gRPC server of the project has: a bound address, health checks, reflection, and a signal to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from token_swarm.errors import BadParameter


class GrpcHost:
    """A gRPC server for one service, from `start` to the end of `announce_stop` and `server.stop`.

    Handlers are registered on `server` before `start`. `field` is what the address is called when it is refused.
    """

    def __init__(
        self,
        service: str,
        address: str,
        *,
        field: str,
        max_message_bytes: int,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),  # type: ignore[type-arg]  # not generic at run time
    ) -> None:
        self.address = address
        self._service = service
        self._field = field
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self.server = grpc.aio.server(
            options=(
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_receive_message_length", max_message_bytes),
                # Otherwise a second server binds the same port without an error and steals half of the connections.
                ("grpc.so_reuseport", 0),
            ),
            interceptors=list(interceptors),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    def bind(self) -> None:
        """Take the address; it then holds the port that was chosen. Raises BadParameter if it is taken."""
        try:
            port = self.server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise BadParameter(self._field, self.address, "free to listen on") from error
        if not self.address.startswith("unix:"):
            self.address = f"{self.address.rpartition(':')[0]}:{port}"

    async def start(self) -> None:
        """Answer, and say so to health checks."""
        await self.server.start()
        for name in ("", self._service):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def announce_stop(self) -> None:
        """Tell health checks that the end is near."""
        await self._health.enter_graceful_shutdown()


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set from now on."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop
