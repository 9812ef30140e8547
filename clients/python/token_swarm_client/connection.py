"""Channels to a server: plain or TLS, and what every call sends along."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.enable_http_proxy", 0),  # http_proxy in the environment would divert loopback connections
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.max_receive_message_length", 4 << 20),
]


@dataclass(frozen=True)
class Tls:
    """Encryption, by PEM files.

    ca: whom to trust; None: the system's authorities. certificate and key: what to show a server that asks for one.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC takes. Raises ValueError for a certificate without its key, OSError for an unreadable file."""
        if (self.certificate is None) != (self.key is None):
            missing = "key" if self.key is None else "certificate"
            raise ValueError(f"tls.{missing}: None is not allowed; give both tls.certificate and tls.key, or neither")
        ca, key, certificate = (
            None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


def metadata_of(address: str, token: str | None, tls: Tls | None) -> tuple[tuple[str, str], ...]:
    """What every call sends along. Raises ValueError for a token that others could read on its way."""
    if token is None:
        return ()
    if tls is None and not stays_on_this_machine(address):
        raise ValueError(f"token: it would travel to {address} unencrypted; give tls as well")
    return (("authorization", f"Bearer {token}"),)


def stays_on_this_machine(address: str) -> bool:
    """Whether what is sent to `address` leaves this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
