"""What tests of guarded servers share: authorities, a certificate, and a file for tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.pki import Pki


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory) -> Pki:
    """Another authority, which the servers do not know."""
    return Pki(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(scope="module")
def server(pki) -> dict[str, Any]:
    """A certificate of this machine, by what settings call it."""
    return pki.issue("server", "127.0.0.1", "localhost")


@pytest.fixture
def tokens(tmp_path) -> Path:
    """Where a server keeps its tokens; there is none yet."""
    return tmp_path / "tokens.json"
