"""What the configuration means for the model at hand."""

from dataclasses import dataclass
from math import gcd
from typing import Any

from vllm.config import VllmConfig

from vllm_tailorkv.config import TailorKVConfig, load_config
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import DerivedKind
from vllm_tailorkv.profile import LayerPlan, ModelShape, layer_plan

SECTION = "tailorkv"


@dataclass(frozen=True)
class Settings:
    """The validated options, and the plan that follows from them and the model."""

    config: TailorKVConfig
    plan: LayerPlan
    split: bool

    def kind(self, layer: int) -> DerivedKind:
        """What decoder layer `layer` keeps in its derived pages."""
        if self.plan.is_dense(layer):
            return DerivedKind.DENSE
        return DerivedKind(self.config.index)

    def layout_fields(self, layer: int, block_size: int) -> dict[str, Any]:
        """What the options say of the pages of decoder layer `layer`: fields of `PageLayout`."""
        kind = self.kind(layer)
        of_index = gcd(self.config.index_group_size, block_size)
        return {
            "kind": kind,
            "group_size": of_index if kind is DerivedKind.ONEBIT else self.config.group_size,
            "bits": self.config.bits,
            # A dense layer reads a few consecutive tokens exactly: rows would gain it nothing.
            "key_rows": self.config.key_rows and kind is not DerivedKind.DENSE,
        }


def options_of(vllm_config: VllmConfig) -> Any:
    """Our section of `--additional-config`, or None."""
    additional = vllm_config.additional_config
    return additional.get(SECTION) if isinstance(additional, dict) else None


def model_shape(vllm_config: VllmConfig) -> ModelShape:
    """The model's shape, before tensor and pipeline parallelism."""
    model = vllm_config.model_config
    return ModelShape(
        name=model.model,
        architecture=(model.hf_config.architectures or ["unknown"])[0],
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        num_heads=model.model_arch_config.total_num_attention_heads,
    )


def load_settings(vllm_config: VllmConfig) -> Settings:
    """Validate our options against the model.

    Raises:
        TailorKVError: naming the option at fault and the remedy.
    """
    config = load_config(options_of(vllm_config))
    shape = model_shape(vllm_config)
    if config.critical_channels > shape.head_size:
        raise TailorKVError(
            f"critical_channels={config.critical_channels} is more than the {shape.head_size} "
            "channels of a head of this model"
        )
    plan = layer_plan(config.profile, shape)
    return Settings(config, plan, split=config.placement == "split")
