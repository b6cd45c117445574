"""Answers several questions about one long text, in one process, without a server.

The text is read once: the questions share it as a prefix. Then each answer is decoded with a part
of the cache.
"""

import argparse
import json
import time
from pathlib import Path

EXAMPLES = """\
examples:
  python examples/offline_batch.py ~/.cache/vllm_tailorkv/models/smollm2-135m
  python examples/offline_batch.py ./my-model --text book.txt --question "Who is the murderer?"
  python examples/offline_batch.py ./my-model --options '{"preset": "accurate"}'
"""
QUESTIONS = ("What is this text about?", "Name one class that it defines.")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the hub")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text (default: a file of Python's library)"
    )
    parser.add_argument("--question", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("--max-model-len", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument(
        "--cache-gib", type=float, default=1.0, metavar="GIB", help="for K and V (default: 1)"
    )
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="of tailorkv (docs/OPTIONS.md)",
    )
    args = parser.parse_args()

    from vllm import LLM, SamplingParams  # noqa: PLC0415  takes seconds

    llm = LLM(
        model=args.model,
        attention_backend="tailorkv",
        additional_config={"tailorkv": args.options},
        max_model_len=args.max_model_len,
        kv_cache_memory_bytes=int(args.cache_gib * 2**30),
        enable_prefix_caching=True,
    )
    tokenizer = llm.get_tokenizer()
    room = args.max_model_len - args.max_tokens - 256
    text = args.text.read_text() if args.text else Path(argparse.__file__).read_text()
    text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:room])
    chat = tokenizer.chat_template is not None
    prompts = [f"{text}\n\n{question}\n" for question in args.question or QUESTIONS]
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    start = time.monotonic()
    if chat:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling)
    else:
        outputs = llm.generate(prompts, sampling)
    for question, output in zip(args.question or QUESTIONS, outputs, strict=True):
        print(f"\n{question} ({len(output.prompt_token_ids):,} tokens)")
        print(output.outputs[0].text.strip())
    print(f"\n{time.monotonic() - start:.1f} s")


# vLLM starts processes that import this file anew.
if __name__ == "__main__":
    main()
