"""Checkpoints of tiny models with random weights, for tests and harnesses."""

from pathlib import Path
from typing import Any

VOCABULARY = 320


def tiny_config(architecture: str, **changes: Any) -> Any:
    """A configuration of some architecture with two to four tiny layers."""
    import transformers  # noqa: PLC0415  takes seconds to load

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    } | changes
    is_part = architecture in ("Gemma3", "Gemma3n", "Gemma4")
    name = f"{architecture}Text" if is_part else architecture
    return getattr(transformers, f"{name}Config")(**values)


def save_random_checkpoint(
    directory: Path, architecture: str, *, std: dict[str, float] | None = None, **changes: Any
) -> Path:
    """A checkpoint with random weights and a tokenizer of single bytes.

    Args:
        std: standard deviations by the end of a parameter's name, the longest that fits; 0
            leaves it as its model makes it.
        changes: those to `tiny_config`.
    """
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    # Wide enough that greedy tokens vary.
    widths = {"": 0.08, "norm.weight": 0.0} | (std or {})
    for name, parameter in model.named_parameters():
        end = max((end for end in widths if name.endswith(end)), key=len)
        if widths[end]:
            torch.nn.init.normal_(parameter, std=widths[end])
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *alphabet]
    names += [f"<extra_{i}>" for i in range(VOCABULARY - len(names))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(directory)
    return directory
