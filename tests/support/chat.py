"""A tokenizer with a chat template, whose tokens do not add up line by line."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

_TOKENIZER = Path(__file__).parents[2] / "benchmarks/accuracy/retriever/tokenizer.json"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The retriever's, with ChatML, and with tokens that reach across a newline."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(_TOKENIZER)), eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([".\nT", "s\n"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
