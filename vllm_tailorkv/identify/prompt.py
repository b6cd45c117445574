"""The prompt that a model is identified with: a file, or word problems of our own."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.identify.problems import word_problems
from vllm_tailorkv.profile import Prompt

NUM_PROBLEMS = 50
"""As many examples as the paper's prompt has."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the model reads it, and what the profile says of it."""

    token_ids: list[int]
    record: Prompt


def _problems(encode: Encode, num_tokens: int | None) -> tuple[str, list[int], str]:
    count = NUM_PROBLEMS
    while True:
        text = word_problems(count)
        token_ids = encode(text)
        if num_tokens is None or len(token_ids) >= num_tokens:
            return f"{count} word problems", token_ids, text
        # Problems differ little in length; a quarter more, so that the first guess is enough.
        count = count * num_tokens // len(token_ids) * 5 // 4 + 1


def _file(path: Path, encode: Encode) -> tuple[str, list[int], str]:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise TailorKVError(f"--prompt-file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TailorKVError(f"--prompt-file {path} is no UTF-8 text: {error}") from None
    return path.name, encode(text), text


def build_prompt(
    encode: Encode, *, file: Path | None, num_tokens: int | None, longest: int, queries: int
) -> TokenPrompt:
    """Read or make the prompt, and cut it.

    Args:
        encode: from text to token ids, the model's special tokens included.
        file: UTF-8 text; None for word problems of our own.
        num_tokens: tokens wanted; None for all of the file, or for 50 problems, of which a model
            with a short context reads as many as it can.
        longest: tokens that the model can read.
        queries: tokens that the prompt must have at least.

    Raises:
        TailorKVError: the file cannot be read, or the prompt is too short or too long.
    """
    if num_tokens is not None and num_tokens > longest:
        raise TailorKVError(
            f"--prompt-tokens {num_tokens:,}: the model reads {longest:,}; lower it, or raise "
            "--max-model-len"
        )
    source, token_ids, text = _problems(encode, num_tokens) if file is None else _file(file, encode)
    if file is not None and num_tokens is None and len(token_ids) > longest:
        raise TailorKVError(
            f"--prompt-file {file} has {len(token_ids):,} tokens, the model reads {longest:,}; "
            f"give --prompt-tokens {longest}, or raise --max-model-len"
        )
    if num_tokens is not None and len(token_ids) < num_tokens:
        raise TailorKVError(
            f"--prompt-tokens {num_tokens:,}: --prompt-file {file} has {len(token_ids):,}; lower it"
        )
    token_ids = token_ids[: longest if num_tokens is None else num_tokens]
    if len(token_ids) < queries:
        raise TailorKVError(
            f"--queries {queries} is more than the {len(token_ids):,} tokens of the prompt; lower "
            "it, or give a longer prompt"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return TokenPrompt(token_ids, Prompt(source=source, sha256=digest, tokens=len(token_ids)))
