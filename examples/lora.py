"""Answers one prompt with a LoRA adapter and without it, in one batch."""

import argparse

EXAMPLES = """\
example:
  python examples/lora.py ./my-model ./my-adapter --prompt "Once upon a time"

A server does the same:
  vllm serve ./my-model --attention-backend tailorkv --enable-lora \\
      --lora-modules mine=./my-adapter
"""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the hub")
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, as peft saves it")
    parser.add_argument("--prompt", default="Once upon a time", help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: 32)")
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=4096, metavar="TOKENS")
    args = parser.parse_args()

    from vllm import LLM, SamplingParams  # noqa: PLC0415  takes seconds
    from vllm.lora.request import LoRARequest  # noqa: PLC0415

    llm = LLM(
        model=args.model,
        attention_backend="tailorkv",
        enable_lora=True,
        max_lora_rank=args.max_lora_rank,
        max_model_len=args.max_model_len,
        kv_cache_memory_bytes=1 << 30,
    )
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    adapter = LoRARequest("adapter", 1, args.adapter)
    outputs = llm.generate([args.prompt] * 2, sampling, lora_request=[adapter, None])
    for name, output in zip(("with", "without"), outputs, strict=True):
        print(f"{name} the adapter: {output.outputs[0].text}")


# vLLM starts processes that import this file anew.
if __name__ == "__main__":
    main()
