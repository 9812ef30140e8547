from __future__ import annotations

from pathlib import Path

import pytest

from token_swarm.files import replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(OSError, match="disk"), replacing(path) as file:
        file.write(b"half of the new")
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
