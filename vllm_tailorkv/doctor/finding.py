"""What a check finds, and how one that fails is a finding too."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

INSTALL = "see docs/INSTALL.md"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        what: the thing looked at.
        found: what was found.
        remedy: what to do before anything can be served; None if nothing needs be done.
        hint: what would be better, though it serves as it is.
    """

    what: str
    found: str
    remedy: str | None = None
    hint: str | None = None


Check = Callable[[], Finding | Iterable[Finding]]


def looked_at(check: Check, *, needed: bool = True) -> list[Finding]:
    """What a check finds, also where it fails: the report goes on.

    Args:
        needed: whether nothing can be served where it fails; else it only tells.
    """
    findings: list[Finding] = []
    try:
        found = check()
        for finding in [found] if isinstance(found, Finding) else found:
            findings.append(finding)
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        said = str(error).strip().partition("\n")[0]
        what = f"{type(error).__name__}: {said}"
        if needed:
            findings.append(Finding(name, what, remedy=INSTALL))
        else:
            findings.append(Finding(name, f"cannot be told ({what})"))
    return findings
