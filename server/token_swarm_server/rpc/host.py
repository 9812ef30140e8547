"""What every gRPC server of the project has: a bound address, authentication, health checks, reflection, and a signal
to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from token_swarm.errors import BadParameter
from token_swarm_server.config.addresses import LISTEN_ALLOWED, parse_listen
from token_swarm_server.config.settings import CoordinatorSettings, ServerTls, exposure_problem
from token_swarm_server.rpc.auth import Authentication
from token_swarm_server.rpc.bearer_tokens import TokenStore
from token_swarm_server.rpc.tls import server_credentials

# For a client that connects and says nothing; gRPC's own default is two minutes.
_HANDSHAKE_MS = 10_000


@dataclass(frozen=True)
class Access:
    """Who may reach a server, and how. `tokens`: a file of `token-swarm tokens`, or None: no token is asked for.

    `allow_insecure`: listen even where strangers could come in or listen along. `tokens_field`, `tls_prefix`: what
    errors call the keys.
    """

    tls: ServerTls | None = None
    tokens: Path | None = None
    allow_insecure: bool = False
    tokens_field: str = "tokens"
    tls_prefix: str = "tls."

    def require_usable(self, address: str, field: str) -> None:
        """Raise BadParameter for what `GrpcHost` would refuse later, when models have been loaded.

        `field`: what the address is called. Makes the folder of a UNIX socket, for this user alone.
        """
        _check_address(address, field, self)
        self.credentials()
        self.token_store()

    def credentials(self) -> grpc.ServerCredentials | None:
        """None: without TLS. Raises BadParameter for TLS files that cannot be used."""
        return None if self.tls is None else server_credentials(self.tls, self.tls_prefix)

    def token_store(self) -> TokenStore | None:
        """None: no token is asked for. Raises BadParameter for a file that cannot be used."""
        return None if self.tokens is None else TokenStore(self.tokens, self.tokens_field)


LOCAL = Access()
"""Whoever can reach the address may call: for addresses that stay on this machine."""


def public_access(settings: CoordinatorSettings) -> Access:
    """What the configuration says of the public server."""
    return Access(settings.tls, settings.tokens, settings.allow_insecure, "coordinator.tokens", "coordinator.tls.")


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
        access: Access = LOCAL,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),  # type: ignore[type-arg]  # not generic at run time
    ) -> None:
        """Raises BadParameter for an address or for files of `access` that cannot be used."""
        _check_address(address, field, access)
        self.address = address
        self._service = service
        self._field = field
        self._access = access
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self._tokens = access.token_store()
        names = access.tls.client_names if access.tls else ()
        guards = [Authentication(self._tokens, names)] if self._tokens or names else []
        self.server = grpc.aio.server(
            options=(
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_receive_message_length", max_message_bytes),
                # Otherwise a second server binds the same port without an error and steals half of the connections.
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
            ),
            # The first one sees a call first: nothing of a stranger's request is looked at.
            interceptors=[*guards, *interceptors],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        services = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, self.server)

    def bind(self) -> None:
        """Take the address; it then holds the port that was chosen.

        Raises BadParameter if it is taken, and for TLS files that cannot be used.
        """
        credentials = self._access.credentials()
        try:
            with _private_sockets():
                if credentials is None:
                    port = self.server.add_insecure_port(self.address)
                else:
                    port = self.server.add_secure_port(self.address, credentials)
        except RuntimeError as error:
            raise BadParameter(self._field, self.address, "free to listen on") from error
        if not self.address.startswith("unix:"):
            self.address = f"{self.address.rpartition(':')[0]}:{port}"

    def reload(self) -> None:
        """Read the tokens again, should the change of their file have gone unseen. Certificates need no telling."""
        if self._tokens is not None:
            self._tokens.reload()

    async def start(self) -> None:
        """Answer, and say so to health checks."""
        await self.server.start()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """What health checks say from now on; without effect after `announce_stop`."""
        status = health_pb2.HealthCheckResponse
        for name in ("", self._service):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def announce_stop(self) -> None:
        """Tell health checks that the end is near."""
        await self._health.enter_graceful_shutdown()


def _check_address(address: str, field: str, access: Access) -> None:
    """Raise BadParameter if nobody could, or `access` says that nobody should, listen there.

    Makes the folder of a UNIX socket, for this user alone.
    """
    try:
        listen = parse_listen(address)
    except ValueError as error:
        raise BadParameter(field, address, LISTEN_ALLOWED) from error
    problem = exposure_problem(
        address, tls=access.tls, tokens=access.tokens is not None, allow_insecure=access.allow_insecure
    )
    if problem is not None:
        remedy = "give TLS and say who may call, or --allow-insecure"
        raise BadParameter(field, address, f"unix:PATH or a loopback address: {problem} ({remedy})")
    if listen.path is None:
        return
    try:
        listen.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = listen.path.exists() and stat.S_ISSOCK(listen.path.stat().st_mode)
    except OSError as error:
        raise BadParameter(field, address, f"in a folder that this user may use ({error.strerror})") from error
    # gRPC would silently take the socket away from a server that listens there.
    with socket.socket(socket.AF_UNIX) as probe:
        if taken and probe.connect_ex(str(listen.path)) == 0:
            raise BadParameter(field, address, "an address where no other server listens")


@contextlib.contextmanager
def _private_sockets() -> Iterator[None]:
    """Inside, new UNIX sockets have mode 0600 from their first moment on: who may write to one may call.

    The mask is the whole process's; a file that another thread makes meanwhile is more private than it had to be.
    """
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def on_signals(*numbers: signal.Signals) -> asyncio.Event:
    """An event that these signals set from now on."""
    event = asyncio.Event()
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    return event


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set from now on."""
    return on_signals(signal.SIGTERM, signal.SIGINT)
