"""Which layers are dense and which are sparse: the layer plan of a model.

A profile file is JSON with `schema_version`, `architecture`, `num_layers`, `num_kv_heads`,
`head_size` (of the whole model, before tensor parallelism) and `dense_layers`. One that was
measured (`vllm-tailorkv identify`) has `num_heads` and `identified` as well: how, on which
prompt, and the score of every layer and head.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from vllm_tailorkv.config import DensePlan
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.files import write_whole

SCHEMA_VERSION = 1
NEIGHBOUR = "tailorkv.json"
"""A profile of this name beside a model's weights is found by itself."""


@dataclass(frozen=True)
class ModelShape:
    """What a profile must fit.

    Args:
        name: the model as the user named it: a hub name or a directory.
        architecture: the first entry of `architectures` in the model's config.
        num_layers: decoder layers, all pipeline stages.
        num_kv_heads: KV heads of a layer, all tensor-parallel ranks.
        head_size: channels of a head.
        num_heads: query heads of a layer, all tensor-parallel ranks; None if unknown.
    """

    name: str
    architecture: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    num_heads: int | None = None


class LayerScore(BaseModel):
    """The dense preference of a layer, in [0, 1]: the mean over its query heads, and each."""

    model_config = ConfigDict(frozen=True)

    score: float
    heads: tuple[float, ...]


class Prompt(BaseModel):
    """The prompt that a model was identified with.

    `sha256` is of the text (UTF-8), of which the first `tokens` tokens were read.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    sha256: str
    tokens: int


class Identification(BaseModel):
    """How a plan was found (section 3.1 of the paper).

    A layer whose score, over the last `queries` queries of the prompt, exceeds `beta` is dense.
    `layers` has None for layers that keep a sliding window: they are left to vLLM.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str
    alpha: float
    beta: float
    queries: int
    prompt: Prompt
    dtype: str
    quantization: str | None
    vllm: str
    layers: tuple[LayerScore | None, ...]

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose score exceeds `beta`, ascending."""
        return tuple(
            i
            for i, layer in enumerate(self.layers)
            if layer is not None and layer.score > self.beta
        )


class Profile(BaseModel):
    """The content of a profile file; what it does not list is kept for its reader."""

    model_config = ConfigDict(frozen=True, extra="allow")

    schema_version: int
    architecture: str
    num_layers: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    dense_layers: tuple[StrictInt, ...]
    identified: Identification | None = None

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.identified is not None and len(self.identified.layers) != self.num_layers:
            raise ValueError(
                f"identified.layers has {len(self.identified.layers)} entries for "
                f"{self.num_layers} layers"
            )
        return self


@dataclass(frozen=True)
class LayerPlan:
    """The kind of every layer.

    Args:
        dense: indices of the dense layers, ascending.
        num_layers: decoder layers in all.
        source: where the plan comes from, for the log.
        is_fallback: whether nothing was known about the model.
    """

    dense: tuple[int, ...]
    num_layers: int
    source: str
    is_fallback: bool = False

    def is_dense(self, layer: int) -> bool:
        """Whether decoder layer `layer` is dense."""
        return layer in self.dense

    @property
    def sparse(self) -> tuple[int, ...]:
        """Indices of the sparse layers, ascending."""
        return tuple(i for i in range(self.num_layers) if i not in self.dense)


def _plan(dense: tuple[int, ...], shape: ModelShape, source: str) -> LayerPlan:
    wrong = sorted(i for i in dense if not 0 <= i < shape.num_layers)
    if wrong:
        raise TailorKVError(
            f"profile ({source}): dense_layers names layers {wrong}, but {shape.name} has layers "
            f"0 to {shape.num_layers - 1}; give the profile of this model"
        )
    return LayerPlan(tuple(sorted(set(dense))), shape.num_layers, source)


def _misfit(profile: Profile, shape: ModelShape) -> str | None:
    """Why a profile is not this model's, or None if it may be."""
    for field in ("architecture", "num_layers", "num_heads", "num_kv_heads", "head_size"):
        of_profile, of_model = getattr(profile, field), getattr(shape, field)
        if None not in (of_profile, of_model) and of_profile != of_model:
            return f"it is for {field} {of_profile}, the model has {of_model}"
    return None


def load_profile(path: Path) -> Profile:
    """The content of a profile file.

    Raises:
        TailorKVError: the file is missing or malformed, or of another schema.
    """
    try:
        profile = Profile.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise TailorKVError(
            f"profile={str(path)!r}: {error.strerror}; give the path of a profile file"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TailorKVError(f"profile={str(path)!r} is no JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise TailorKVError(
            f"profile={str(path)!r}: {': '.join([*map(str, first['loc']), first['msg']])}"
        ) from None
    if profile.schema_version != SCHEMA_VERSION:
        raise TailorKVError(
            f"profile={str(path)!r} has schema_version {profile.schema_version}; this version of "
            f"vllm-tailorkv reads {SCHEMA_VERSION}"
        )
    return profile


def read_profile(path: Path, shape: ModelShape, *, was_given: bool = True) -> LayerPlan:
    """The plan of a profile file.

    Args:
        was_given: whether the user named it, rather than that it lay beside the model.

    Raises:
        TailorKVError: the file is missing or malformed, or was made for another model.
    """
    profile = load_profile(path)
    if why := _misfit(profile, shape):
        remedy = "give the profile of this model, or leave the option out"
        if not was_given:
            remedy = (
                "it lies beside the model and was found by itself: name another one in the option "
                """profile, or give '{"tailorkv": {"profile": {"dense_layers": []}}}' for none"""
            )
        raise TailorKVError(f"profile={str(path)!r} does not fit {shape.name}: {why}; {remedy}")
    return _plan(profile.dense_layers, shape, str(path))


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile file, a layer's scores on one line. An older one stays until it is whole.

    Raises:
        TailorKVError: the file cannot be written.
    """
    text = json.dumps(profile.model_dump(mode="json"), indent=2)
    text = re.sub(r"\[\n[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    try:
        write_whole(path, text + "\n")
    except OSError as error:
        raise TailorKVError(
            f"--output {path}: {error.strerror}; give a path that can be written"
        ) from None


def _published() -> Iterator[dict[str, Any]]:
    text = (files("vllm_tailorkv") / "data" / "profiles.json").read_text()
    yield from json.loads(text)["profiles"]


def base_name(model: str) -> str:
    """A model's name without its owner, in lower case, also from the hub's cache folder.

    Offline, vLLM names a model by its snapshot, `.../models--owner--name/snapshots/<hash>`.
    """
    for part in Path(model).parts:
        if part.startswith("models--"):
            return part.rpartition("--")[2].lower()
    return Path(model).name.lower()


def layer_plan(profile: str | DensePlan | None, shape: ModelShape) -> LayerPlan:
    """The plan of a model: as asked, else beside it, else as known, else no dense layer.

    Nothing is guessed: a layer wrongly taken for dense loses what it looks for, at any budget.

    Raises:
        TailorKVError: the profile asked for or found does not fit the model.
    """
    if isinstance(profile, DensePlan):
        return _plan(profile.dense_layers, shape, "dense_layers given")
    if isinstance(profile, str):
        return read_profile(Path(profile), shape)
    neighbour = Path(shape.name) / NEIGHBOUR
    if neighbour.is_file():
        return read_profile(neighbour, shape, was_given=False)
    name = base_name(shape.name)
    for entry in _published():
        known = ModelShape(
            shape.name,
            entry["architecture"],
            entry["num_layers"],
            entry["num_kv_heads"],
            entry["head_size"],
            shape.num_heads,
        )
        if any(name.startswith(alias) for alias in entry["names"]) and known == shape:
            source = f"{entry['source']} for {entry['name']}"
            return _plan(tuple(entry["dense_layers"]), shape, source)
    return LayerPlan((), shape.num_layers, "no profile", is_fallback=True)
