"""Files are whole at any time: what fails or is interrupted leaves what was there."""

import os
from pathlib import Path

import pytest

from vllm_tailorkv.files import replaced, write_whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("older", [None, "older"])
def test_an_interrupted_file_leaves_the_one_before(
    error: type[BaseException], older: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if older:
        path.write_text(older)
    with pytest.raises(error), replaced(path) as file:
        file.write(b"half")
        file.flush()
        assert (path.read_text() if path.exists() else None) == older
        raise error
    assert [x.read_text() for x in tmp_path.iterdir()] == ([older] if older else [])


def test_it_is_on_disk_before_it_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    write_whole(path, "all")
    assert synced == [False] and path.read_text() == "all"


def test_what_a_kill_has_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.new").write_text("a long half of something")
    write_whole(tmp_path / "file", "all")
    assert [x.read_text() for x in tmp_path.iterdir()] == ["all"]


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("older")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "newer")
    assert link.is_symlink() and path.read_text() == "newer"
    assert path.stat().st_mode & 0o777 == 0o640
