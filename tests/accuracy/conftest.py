"""Fixtures of the tests of the harness."""

import pytest
from accuracy.tasks.base import words


@pytest.fixture
def small_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five short documents, since reading the documentation of whole packages takes long."""
    words()  # names come from the real text, and are kept for other tests
    documents = tuple(
        (f"thing_{i}", "".join(f"Line {n} of {i} tells {n * i} things to you.\n" for n in range(9)))
        for i in range(5)
    )
    monkeypatch.setattr("accuracy.text.documents", lambda packages: documents)
