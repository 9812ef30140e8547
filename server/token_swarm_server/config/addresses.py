"""Addresses to listen on and to connect to: one reading of `host:port` and `unix:/path` for the whole project."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

_UNIX = "unix:"
# sun_path of the kernel, less its final zero.
_SOCKET_PATH_BYTES = 107
LISTEN_ALLOWED = (
    f"{_UNIX}/absolute/path of less than {_SOCKET_PATH_BYTES + 1} bytes, or host:port (host: localhost or an IP "
    "address such as 127.0.0.1 or [::1]; port 0: any free one)"
)
TARGET_ALLOWED = "host:port, such as 127.0.0.1:50061, or unix:/path/of/a/socket"
LONG_FORMS = ("dns:", "ipv4:", "ipv6:", "unix-abstract:", "vsock:", "xds:")
"""gRPC's other ways to name a server, which it reads itself."""


@dataclass(frozen=True)
class ListenAddress:
    """An address to listen on. `path`: of a UNIX socket, or None; then `host` (IPv6 without brackets) and `port` count.

    `public`: whether other machines could reach it.
    """

    path: Path | None
    host: str
    port: int
    public: bool


def parse_listen(value: str) -> ListenAddress:
    """Read an address to listen on. Raises ValueError, whose message says what is allowed, starting with "must be"."""
    if value.startswith(_UNIX):
        path = value.removeprefix(_UNIX)
        if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
            raise ValueError(f"must be {LISTEN_ALLOWED}")
        return ListenAddress(Path(path), "", 0, public=False)
    host, _, port = value.rpartition(":")
    if not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) > 65535:
        raise ValueError(f"must be {LISTEN_ALLOWED}")
    if host == "localhost":
        return ListenAddress(None, host, int(port), public=False)
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        # A name would be looked up when the server starts, and nothing says what it will mean then.
        raise ValueError(f"must be {LISTEN_ALLOWED}") from None
    if bracketed != (address.version == 6):
        raise ValueError(f"must be {LISTEN_ALLOWED}")
    return ListenAddress(None, str(address), int(port), public=not address.is_loopback)


def split_target(value: str) -> tuple[str | None, str, int]:
    """Path of a UNIX socket or None, host (IPv6 without brackets) and port of an address to connect to.

    Raises ValueError, whose message says what is allowed, starting with "must be". LONG_FORMS are not read here.
    """
    if value.startswith(_UNIX):
        # unix:///path is the same with an empty authority.
        path = value.removeprefix(_UNIX)
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path or "\0" in path:
            raise ValueError(f"must be {TARGET_ALLOWED}")
        return path, "", 0
    if "://" in value:
        scheme, _, rest = value.partition("://")
        raise ValueError(f"must be {TARGET_ALLOWED}; it is gRPC, not {scheme}: write {rest.rstrip('/') or 'host:port'}")
    host, colon, port = value.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        bare = value if colon else value or "127.0.0.1"
        host = f"[{bare}]" if colon else "127.0.0.1" if bare.isdecimal() else bare
        port = bare if bare.isdecimal() else "50061"
        raise ValueError(f"must be {TARGET_ALLOWED}; host and port are both needed: {host}:{port}")
    if not (port.isascii() and port.isdecimal()) or len(port) > 5 or not 0 < int(port) <= 65535:
        raise ValueError(f"must be {TARGET_ALLOWED}; the port is a number from 1 to 65535")
    if not host.strip("[]") or any(char.isspace() or char in "/@" for char in host):
        raise ValueError(f"must be {TARGET_ALLOWED}")
    return None, host.removeprefix("[").removesuffix("]"), int(port)


def check_target(value: str) -> str:
    """`value`, an address to connect to, if it is one. Raises as `split_target` does."""
    if not value.startswith(LONG_FORMS):
        split_target(value)
    return value


def stays_on_this_machine(target: str) -> bool:
    """Whether what is sent to `target`, a gRPC address to connect to, never leaves this machine.

    A name other than localhost does not count, whatever it resolves to.
    """
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    try:
        return not parse_listen(target).public
    except ValueError:
        return False
