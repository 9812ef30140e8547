"""TLS credentials out of PEM files, checked before gRPC sees them: it would only fail at each handshake."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from token_swarm.errors import BadParameter
from token_swarm_server.config.settings import ClientTls, ServerTls

logger = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]


def client_credentials(tls: ClientTls, prefix: str) -> grpc.ChannelCredentials:
    """Credentials of a client. `prefix`: of the keys in errors, `tls.` or `--tls-`. Raises BadParameter."""
    ca = None if tls.ca is None else _read_ca(tls.ca, f"{prefix}ca")
    if tls.certificate is None or tls.key is None:
        return grpc.ssl_channel_credentials(ca)
    key, chain = _read_pair(tls.certificate, tls.key, prefix)
    return grpc.ssl_channel_credentials(ca, key, chain)


def server_credentials(tls: ServerTls, prefix: str) -> grpc.ServerCredentials:
    """Credentials of a server, which follow the files: a renewed certificate is used from the next connection on.

    `prefix`: of the keys in errors, `tls.` or `--tls-`. Raises BadParameter.
    """
    files = _ServerFiles(tls, prefix)
    return grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.changed,  # type: ignore[arg-type]  # None means "as before", says grpc's documentation
        require_client_authentication=tls.client_ca is not None,
    )


@dataclass
class _ServerFiles:
    """What the files of a server hold, and whether it is something new."""

    tls: ServerTls
    prefix: str
    _seen: _Stamp = ()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files. Raises BadParameter."""
        self._seen = self._stamp()
        pair = _read_pair(self.tls.certificate, self.tls.key, self.prefix)
        name = "client-ca" if self.prefix.startswith("--") else "client_ca"
        ca = None if self.tls.client_ca is None else _read_ca(self.tls.client_ca, f"{self.prefix}{name}")
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=ca)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new contents if the files have changed and can be used, else None. gRPC asks before each handshake."""
        if self._stamp() == self._seen:
            return None
        try:
            configuration = self.read()
        except BadParameter as error:
            # Also the moment between the writing of the certificate and of its key.
            logger.warning("the old certificate stays in use: %s", error)
            return None
        logger.info("%s was read again", self.tls.certificate)
        return configuration

    def _stamp(self) -> _Stamp:
        paths = [self.tls.certificate, self.tls.key, *([self.tls.client_ca] if self.tls.client_ca else [])]
        return tuple(map(_stamp, paths))


def _stamp(path: Path) -> tuple[int, int, int]:
    """What tells one state of a file from the next; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadParameter(field, str(path), f"a file that can be read ({error.strerror})") from error


def _read_ca(path: Path, field: str) -> bytes:
    """The certificates of authorities, in PEM. Raises BadParameter."""
    pem = _read(path, field)
    try:
        ssl.create_default_context(cadata=pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise BadParameter(field, str(path), "a PEM file of certificates") from error
    return pem


def _read_pair(certificate: Path, key: Path, prefix: str) -> tuple[bytes, bytes]:
    """A private key and the certificate chain it belongs to, in PEM. Raises BadParameter."""
    chain, private = _read(certificate, f"{prefix}certificate"), _read(key, f"{prefix}key")

    def no_password(*_: Any) -> NoReturn:
        raise BadParameter(f"{prefix}key", str(key), "not encrypted: nobody is there to type a password")

    try:
        # Otherwise a key of another certificate would be found at the first handshake.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, no_password)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or "not PEM"
        allowed = f"the PEM file of the private key of {certificate} ({reason.lower().replace('_', ' ')})"
        raise BadParameter(f"{prefix}key", str(key), allowed) from error
    return private, chain
