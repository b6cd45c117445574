"""The command `vllm-tailorkv`."""

import argparse
import sys
from collections.abc import Sequence

import vllm_tailorkv
from vllm_tailorkv.quiet import quiet, stay_quiet

# vLLM's processes import the program that started them, and then vLLM.
stay_quiet()

EXAMPLES = """\
examples:
  vllm-tailorkv doctor
      what is installed, what will run and why, what is missing
  vllm-tailorkv options
      every option with its default, its values and its meaning
  vllm-tailorkv identify ./my-model --plot scores.png
      measure which layers are dense; the profile goes beside the model
  vllm-tailorkv plan ./my-model --device-gib 24 --host-gib 64
      what fits on a GPU, or with --cpu on a server without one
  vllm-tailorkv top http://localhost:8000
      watch a server: requests, tokens, bytes of each tier, waits, quality
  vllm-tailorkv demo --tokens 32768
      hide needles in a long real text and ask for them through a server

serving is vLLM's own command:
  vllm serve MODEL --attention-backend tailorkv
  vllm serve MODEL --attention-backend tailorkv \\
      --additional-config '{"tailorkv": {"preset": "accurate", "bits": 4}}'
"""


def _print_options() -> int:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from vllm_tailorkv import envs, options_page  # noqa: PLC0415

    table = Table(title="Options of --additional-config '{\"tailorkv\": {...}}'")
    for header, width in (("option", None), ("default", None), ("values", 18), ("meaning", None)):
        table.add_column(header, overflow="fold", max_width=width)
    for row in options_page.options():
        table.add_row(*(cell.replace("`", "") for cell in row))
    console = Console()
    console.print(table)
    console.print(f"Each can be overridden by {envs.PREFIX}<OPTION>. Other variables:")
    for variable, meaning in envs.VARIABLES.items():
        console.print(f"  [bold]{variable}[/]: {meaning}", highlight=False)
    return 0


def _print_markdown() -> int:
    from vllm_tailorkv import options_page  # noqa: PLC0415

    print(options_page.markdown(), end="")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line without the program's name; default: `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-tailorkv",
        description="TailorKV for vLLM: long contexts in a fraction of the decode bandwidth.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=vllm_tailorkv.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="say what is installed, what will run and what is missing",
        description="Say what is installed, what will run and why, and what is missing. Exit "
        "status: 0 if tailorkv can serve, else 1.",
    )
    options = commands.add_parser(
        "options",
        help="list every option with its default, values and meaning",
        description="List every option with its default, values and meaning, and the environment "
        "variables.",
    )
    options.add_argument("--markdown", action="store_true", help="as the page docs/OPTIONS.md")
    commands.add_parser(
        "identify", help="find the dense layers of a model (see identify --help)", add_help=False
    )
    commands.add_parser(
        "plan",
        help="say what fits into a machine's memory (see plan --help)",
        add_help=False,
    )
    commands.add_parser("top", help="watch a server (see top --help)", add_help=False)
    commands.add_parser("demo", help="run the demo (see demo --help)", add_help=False)
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command == "demo":
        from vllm_tailorkv.demo import __main__ as demo  # noqa: PLC0415

        return demo.main(rest)
    if parsed.command == "identify":
        from vllm_tailorkv.identify import command  # noqa: PLC0415

        return command.main(rest)
    if parsed.command == "plan":
        from vllm_tailorkv.capacity import command as plan  # noqa: PLC0415

        return plan.main(rest)
    if parsed.command == "top":
        from vllm_tailorkv.top import command as top  # noqa: PLC0415

        return top.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if parsed.command == "options":
        return _print_markdown() if parsed.markdown else _print_options()
    from vllm_tailorkv.doctor import command as doctor  # noqa: PLC0415

    quiet()
    return doctor.run()


if __name__ == "__main__":
    sys.exit(main())
