"""What a process notes for the first one, which tells it."""

from pathlib import Path

import pytest

from vllm_tailorkv import failures
from vllm_tailorkv.errors import TailorKVError


@failures.noted
def fail(words: str) -> None:
    raise TailorKVError(words)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where another process, the first, looks for a note."""
    path = tmp_path / "note"
    monkeypatch.setenv("_TAILORKV_FAILURE", f"0:{path}")
    return path


def test_the_last_note_counts(file: Path) -> None:
    file.touch()
    for words in ("a long sentence", "a short one"):
        with pytest.raises(TailorKVError, match=words):
            fail(words)
        assert file.read_text() == words


def test_no_file_is_made_where_nobody_looks(file: Path) -> None:
    """The first process may be on another machine."""
    with pytest.raises(TailorKVError, match="a sentence"):
        fail("a sentence")
    assert not file.exists()
