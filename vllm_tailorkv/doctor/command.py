"""The report: every finding, then one line that says whether it can serve."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_tailorkv.doctor import installed, machine, serving
from vllm_tailorkv.doctor.finding import Finding, looked_at

SERVE = "vllm serve MODEL --attention-backend tailorkv"


def run() -> int:
    """Print the report.

    Returns:
        0 if tailorkv can serve, else 1.
    """
    console = Console()
    findings: list[Finding] = []
    # Importing vLLM takes seconds.
    with console.status("Looking"):
        for check in (
            installed.check_versions,
            installed.check_command,
            installed.check_plugin,
            installed.check_options,
        ):
            findings += looked_at(check)
        findings += looked_at(installed.check_multimodal, needed=False)
        findings += looked_at(machine.check_processor, needed=False)
        findings += looked_at(machine.check_memory, needed=False)
        findings += looked_at(machine.check_huge_pages, needed=False)
        for check in (
            serving.check_platform,
            serving.check_gpus,
            serving.check_ops,
            serving.check_gpu_ops,
            serving.check_patches,
        ):
            findings += looked_at(check)
    _print(console, findings)
    remedies = list(dict.fromkeys(finding.remedy for finding in findings if finding.remedy))
    if not remedies:
        words = f"ready to serve on {_served_on()}: {SERVE}"
        console.print(words, style="green", highlight=False, markup=False, soft_wrap=True)
        return 0
    more = f" (and {len(remedies) - 1} more above)" if len(remedies) > 1 else ""
    words = f"not ready: {remedies[0]}{more}"
    console.print(words, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1


def _served_on() -> str:
    try:
        return serving.served_on()
    except Exception:  # Everything that is needed was looked at.
        return "this machine"


def _print(console: Console, findings: list[Finding]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.remedy is None else "[red]--[/]"
        table.add_row(mark if finding.what else "", finding.what, Text(finding.found))
        for kind, words in (("remedy", finding.remedy), ("hint", finding.hint)):
            if words is not None:
                table.add_row("", "", Text(f"{kind}: {words}", style="yellow"))
    console.print(table)
