"""An authority that is made for the test, and the certificates it signs."""

from __future__ import annotations

from pathlib import Path

import trustme
from token_swarm_server.config.settings import ClientTls


class Pki:
    """An authority and the certificates it has signed, as PEM files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, file: str, *names: str, common_name: str | None = None) -> dict[str, str]:
        """Make FILE.pem and FILE.key; their paths by what settings call them."""
        issued = self._authority.issue_cert(*names, common_name=common_name)
        certificate, key = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return {"certificate": str(certificate), "key": str(key)}

    def client(self, file: str, *names: str, common_name: str | None = None) -> ClientTls:
        return ClientTls.model_validate({"ca": self.ca, **self.issue(file, *names, common_name=common_name)})
