from __future__ import annotations

from pathlib import Path

import pytest

from pxcompress.cache import whole_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way() -> None:
        with whole_file(path) as beside:
            beside.write_text("ne")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    with whole_file(path) as beside:
        beside.write_text("new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"
