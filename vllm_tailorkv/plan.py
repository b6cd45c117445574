"""The plan of a served model: options, layers, and the pages that follow from them. No vLLM.

It is made once, in the process that the user starts, and carried to the others inside vLLM's
configuration: no other place reads options or profiles, or puts a layout together.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any, Self

from vllm_tailorkv.config import TailorKVConfig, load_config
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import DerivedKind, PageLayout
from vllm_tailorkv.profile import LayerPlan, ModelShape, layer_plan


@dataclass(frozen=True)
class Plan:
    """What serving does, decided.

    Args:
        model: the model that it was made for.
        config: the options, completed and checked.
        layers: which layers are dense (the paper's word; their K and V are quantized) and which
            are sparse.
    """

    model: ModelShape
    config: TailorKVConfig
    layers: LayerPlan

    @property
    def split(self) -> bool:
        """Whether full-precision K and V lie in a pool of our own."""
        return self.config.placement == "split"

    def kind(self, layer: int) -> DerivedKind:
        """What decoder layer `layer` keeps in its derived pages."""
        return page_kind(self.config, dense=self.layers.is_dense(layer))

    def layout(
        self, layer: int, *, num_kv_heads: int, head_size: int, block_size: int, kv_itemsize: int
    ) -> PageLayout:
        """The pages of decoder layer `layer`.

        Args:
            num_kv_heads: KV heads of the layer on one worker.
            head_size: channels of a head.
            block_size: tokens of a block.
            kv_itemsize: bytes of an element of K or V.
        """
        return page_layout(
            self.config,
            self.kind(layer),
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_size=block_size,
            kv_itemsize=kv_itemsize,
        )

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes, of JSON's types alone."""
        return {
            "model": asdict(self.model),
            # What was not given is not written: some options exclude others.
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "layers": asdict(self.layers) | {"dense": list(self.layers.dense)},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`."""
        layers = values["layers"]
        return cls(
            ModelShape(**values["model"]),
            TailorKVConfig.model_validate(values["config"]),
            LayerPlan(**{**layers, "dense": tuple(layers["dense"])}),
        )


def page_kind(config: TailorKVConfig, *, dense: bool) -> DerivedKind:
    """What a layer keeps in its derived pages."""
    return DerivedKind.DENSE if dense else DerivedKind(config.index)


def page_layout(
    config: TailorKVConfig,
    kind: DerivedKind,
    *,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    kv_itemsize: int,
) -> PageLayout:
    """The pages of a layer of some kind; see `Plan.layout`."""
    group_size: int = config.group_size
    if kind is DerivedKind.ONEBIT:
        group_size = gcd(config.index_group_size, block_size)
    return PageLayout(
        kind,
        num_kv_heads,
        head_size,
        block_size,
        group_size,
        config.bits,
        kv_itemsize,
        # A dense layer reads a few consecutive tokens exactly: rows would gain it nothing.
        key_rows=config.key_rows and kind is not DerivedKind.DENSE,
    )


def make_plan(options: Any, model: ModelShape) -> Plan:
    """Validate options, the environment's included, against a model, and find its profile.

    Args:
        options: the value of `additional_config["tailorkv"]`, a dict or None.

    Raises:
        TailorKVError: naming the option at fault and the remedy.
    """
    config = load_config(options)
    if config.critical_channels > model.head_size:
        raise TailorKVError(
            f"critical_channels={config.critical_channels} is more than the {model.head_size} "
            "channels of a head of this model"
        )
    return Plan(model, config, layer_plan(config.profile, model))
