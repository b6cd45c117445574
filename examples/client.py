"""Asks a server one question about a text, and shows the answer as it comes."""

import argparse
import sys
from pathlib import Path

from openai import APIError, OpenAI

EXAMPLES = """\
examples:
  python examples/client.py --question "What is vLLM?"
  python examples/client.py --text book.txt --question "Who is the murderer?"
"""


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="(default: %(default)s)")
    parser.add_argument("--api-key", default="none", help="what the server was started with")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to ask about")
    parser.add_argument("--question", required=True, metavar="TEXT")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="of the answer (default: %(default)s)"
    )
    args = parser.parse_args()
    client = OpenAI(base_url=args.url, api_key=args.api_key)
    text = args.text.read_text() + "\n\n" if args.text else ""
    try:
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": text + args.question}],
            max_tokens=args.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage is not None:
                usage = chunk.usage
                print(f"\n({usage.prompt_tokens:,} tokens read, {usage.completion_tokens} written)")
    except APIError as error:
        print(f"{args.url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
