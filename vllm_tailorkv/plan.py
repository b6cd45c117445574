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
from vllm_tailorkv.layout import GIB, DerivedKind, KeyLayout, PageLayout
from vllm_tailorkv.profile import LayerPlan, ModelShape, layer_plan

HOST_SHARE = 0.6
"""Of the memory available to a GPU's worker, what its host pool takes by default."""


_FEWEST_HOT = 64


def hot_sets(tokens: int) -> int:
    """Places of each KV head for rows on the device, where `tokens`, positive, are asked for."""
    return 1 << (max(tokens, _FEWEST_HOT) - 1).bit_length()


@dataclass(frozen=True)
class Plan:
    """What serving does, decided.

    Args:
        model: the model that it was made for.
        config: the options, completed and checked.
        layers: which layers are dense (the paper's word; their K and V are quantized) and which
            are sparse.
        device: whose memory the derived tier is in: "cpu" or "cuda".
        host_pool: bytes of each worker's pool of full-precision K and V, or None for a share of
            vLLM's memory.
    """

    model: ModelShape
    config: TailorKVConfig
    layers: LayerPlan
    device: str = "cpu"
    host_pool: int | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes, and reads full-precision K and V over the bus."""
        return self.device == "cuda"

    @property
    def split(self) -> bool:
        """Whether full-precision K and V lie in a pool of our own."""
        return self.on_gpu or self.config.placement == "split"

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
            on_gpu=self.on_gpu,
        )

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes, of JSON's types alone."""
        return {
            "model": asdict(self.model),
            # What was not given is not written: some options exclude others.
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "layers": asdict(self.layers) | {"dense": list(self.layers.dense)},
            "device": self.device,
            "host_pool": self.host_pool,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`."""
        layers = values["layers"]
        return cls(
            ModelShape(**values["model"]),
            TailorKVConfig.model_validate(values["config"]),
            LayerPlan(**{**layers, "dense": tuple(layers["dense"])}),
            values["device"],
            values["host_pool"],
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
    on_gpu: bool = False,
) -> PageLayout:
    """The pages of a layer of some kind; see `Plan.layout`.

    Args:
        on_gpu: whether K is read over the bus.
    """
    group_size: int = config.group_size
    if kind is DerivedKind.ONEBIT:
        group_size = gcd(config.index_group_size, block_size)
    # Whole channels of K are read by an index of channels alone; on a GPU, over the bus, only whole
    # rows are cheap.
    by_channels = kind is DerivedKind.CHANNELS and not on_gpu
    return PageLayout(
        kind,
        num_kv_heads,
        head_size,
        block_size,
        group_size,
        config.bits,
        kv_itemsize,
        KeyLayout.CHANNEL_MAJOR if by_channels else KeyLayout.TOKEN_MAJOR,
        key_rows=config.key_rows and by_channels,
    )


def _for_gpu(config: TailorKVConfig) -> TailorKVConfig:
    """Options as a GPU needs them, where none were given.

    Raises:
        TailorKVError: those given are for CPUs.
    """
    if config.placement == "joint":
        raise TailorKVError(
            'placement="joint" keeps full-precision K and V in vLLM\'s pages, which are device '
            "memory here; leave it out"
        )
    if config.guard_share > 0:
        raise TailorKVError(
            f"guard_share={config.guard_share:g} is for CPUs: on a GPU decode steps replay as CUDA "
            "graphs, which compare nothing; leave it out"
        )
    if "full_attention_below" in config.model_fields_set:
        return config
    return TailorKVConfig.model_validate(
        config.model_dump(exclude_unset=True) | {"full_attention_below": 0}
    )


def make_plan(
    options: Any, model: ModelShape, *, device: str = "cpu", host_memory: int | None = None
) -> Plan:
    """Validate options, the environment's included, against a model, and find its profile.

    Args:
        options: the value of `additional_config["tailorkv"]`, a dict or None.
        device: see `Plan`.
        host_memory: bytes that each worker may have, of which the host pool takes a share where a
            GPU is served and no option sets its size.

    Raises:
        TailorKVError: naming the option at fault and the remedy.
    """
    config = load_config(options)
    if device == "cuda":
        config = _for_gpu(config)
    elif config.hot_tokens:
        raise TailorKVError(
            f"hot_tokens={config.hot_tokens} is for GPUs, which read K and V over the bus; leave "
            "it out"
        )
    elif config.host_pool_gib is not None and config.placement != "split":
        raise TailorKVError(
            f'host_pool_gib={config.host_pool_gib:g} needs placement="split", is '
            f'"{config.placement}": vLLM\'s own cache memory (--kv-cache-memory-bytes) holds both '
            "tiers on CPUs"
        )
    if config.critical_channels > model.head_size:
        raise TailorKVError(
            f"critical_channels={config.critical_channels} is more than the {model.head_size} "
            "channels of a head of this model"
        )
    host_pool = None
    if config.host_pool_gib is not None:
        host_pool = int(config.host_pool_gib * GIB)
    elif device == "cuda" and host_memory is not None:
        host_pool = int(host_memory * HOST_SHARE)
    return Plan(model, config, layer_plan(config.profile, model), device, host_pool)
