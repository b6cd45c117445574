"""The demo's results, as tables for a person and as JSON for a program."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vllm_tailorkv.demo.client import Answer, AnswerT, Measurement, Reply
from vllm_tailorkv.demo.questions import LongText
from vllm_tailorkv.demo.server import TailorKVPlan
from vllm_tailorkv.demo.text import Haystack

_SHOWN_CHARS = 24
_REPLY_CHARS = 60


def print_report(
    console: Console,
    haystack: Haystack,
    plan: TailorKVPlan | None,
    tailorkv: Measurement[Answer],
    reference: Measurement[Answer],
) -> None:
    """Print the answers side by side, then what a decode step reads, then the times.

    Args:
        haystack: what both backends were asked about.
        plan: of the server with tailorkv; None if it printed none.
        tailorkv: what the backend of this project did.
        reference: what vLLM's own backend did.
    """
    answers = Table(title=f"{len(haystack.needles)} needles in {haystack.num_tokens:,} tokens")
    answers.add_column("needle")
    answers.add_column("depth", justify="right")
    answers.add_column("number", justify="right")
    answers.add_column("tailorkv")
    answers.add_column("vLLM's own backend")
    for ours, theirs in zip(tailorkv.answers, reference.answers, strict=True):
        answers.add_row(
            ours.placed.needle.name,
            f"{ours.placed.token_offset / haystack.num_tokens:.0%}",
            ours.placed.needle.code,
            _verdict(ours),
            _verdict(theirs),
        )
    console.print(answers)
    _print_costs(console, plan, haystack.num_tokens, tailorkv, reference)


def lost(tailorkv: Measurement[Reply], reference: Measurement[Reply]) -> list[str]:
    """Titles of the questions that vLLM's own backend answered right and tailorkv did not."""
    return [
        ours.placed.question.title
        for ours, theirs in zip(tailorkv.answers, reference.answers, strict=True)
        if theirs.is_right and not ours.is_right
    ]


def print_chat_report(
    console: Console,
    text: LongText,
    plan: TailorKVPlan | None,
    tailorkv: Measurement[Reply],
    reference: Measurement[Reply],
) -> None:
    """Print a chat model's replies side by side, what was lost, and the rest of the report.

    Args:
        console: where to.
        text: what both backends were asked about.
        plan: of the server with tailorkv; None if it printed none.
        tailorkv: what the backend of this project did.
        reference: what vLLM's own backend did.
    """
    asked = len(text.questions)
    replies = Table(title=f"{asked} questions on {text.num_tokens:,} tokens")
    replies.add_column("question about")
    replies.add_column("depth", justify="right", no_wrap=True)
    replies.add_column("answer")
    replies.add_column("tailorkv")
    replies.add_column("vLLM's own backend")
    pairs = list(zip(tailorkv.answers, reference.answers, strict=True))
    for ours, theirs in pairs:
        question, offset = ours.placed.question, ours.placed.token_offset
        if question.is_judged:
            replies.add_row(
                escape(question.title),
                "" if offset is None else f"{offset / text.num_tokens:.0%}",
                escape(question.answers[0]),
                _reply(ours),
                _reply(theirs),
            )
    console.print(replies)
    for ours, theirs in pairs:
        if not ours.placed.question.is_judged:
            free = Table("", "", title=escape(ours.placed.question.prompt), show_header=False)
            free.add_row("tailorkv", Text(" ".join(ours.text.split())))
            free.add_row("vLLM's own backend", Text(" ".join(theirs.text.split())))
            console.print(free)

    judged = sum(placed.question.is_judged for placed in text.questions)
    missing = lost(tailorkv, reference)
    same = sum(ours.text == theirs.text for ours, theirs in pairs)
    console.print(
        f"Right: tailorkv {_num_right(tailorkv)} of {judged}, vLLM's own backend "
        f"{_num_right(reference)} of {judged}. Word for word the same: {same} of "
        f"{asked}. Lost by tailorkv: {escape('; '.join(missing)) or 'none'}",
        highlight=False,
        style="bold red" if missing else "green",
    )
    _print_costs(console, plan, text.num_tokens, tailorkv, reference)


def _print_costs(
    console: Console,
    plan: TailorKVPlan | None,
    num_tokens: int,
    tailorkv: Measurement[AnswerT],
    reference: Measurement[AnswerT],
) -> None:
    """What a decode step reads over `num_tokens`, then the times."""
    if plan is None:
        console.print("[yellow]The server with tailorkv printed no plan: nothing to compare.[/]")
    else:
        reads = Table(title="What a decode step reads, what a token costs", show_header=False)
        for row in _plan_rows(plan, num_tokens):
            reads.add_row(*row)
        console.print(reads)

    times = Table("", "tailorkv", "vLLM's own backend", title="Seconds")
    times.add_row(
        "per output token (median)",
        f"{tailorkv.seconds_per_token:.4f}",
        f"{reference.seconds_per_token:.4f}",
    )
    times.add_row(
        "reading the haystack once",
        f"{tailorkv.prefill_seconds:.1f}",
        f"{reference.prefill_seconds:.1f}",
    )
    console.print(times)


def as_json(
    haystack: Haystack,
    plan: TailorKVPlan | None,
    tailorkv: Measurement[Answer],
    reference: Measurement[Answer],
) -> dict[str, object]:
    """The same results as plain data; times in seconds, depths in tokens."""
    return {
        "num_tokens": haystack.num_tokens,
        "plan": None if plan is None else plan.model_dump(),
        "tailorkv": _measurement_json(tailorkv),
        "vllm": _measurement_json(reference),
    }


def chat_as_json(
    text: LongText,
    plan: TailorKVPlan | None,
    tailorkv: Measurement[Reply],
    reference: Measurement[Reply],
) -> dict[str, object]:
    """The results with a chat model as plain data; times in seconds, depths in tokens."""
    return {
        "num_tokens": text.num_tokens,
        "plan": None if plan is None else plan.model_dump(),
        "tailorkv": _chat_measurement_json(tailorkv),
        "vllm": _chat_measurement_json(reference),
        "lost": lost(tailorkv, reference),
    }


def _chat_measurement_json(measurement: Measurement[Reply]) -> dict[str, object]:
    return {
        "right": _num_right(measurement),
        "answers": [
            {
                "question": reply.placed.question.prompt,
                "token_offset": reply.placed.token_offset,
                "right_answers": list(reply.placed.question.answers),
                "reply": reply.text,
                "right": reply.is_right if reply.placed.question.is_judged else None,
            }
            for reply in measurement.answers
        ],
        "prefill_seconds": measurement.prefill_seconds,
        "seconds_per_token": measurement.seconds_per_token,
    }


def _num_right(measurement: Measurement[AnswerT]) -> int:
    return sum(answer.is_right for answer in measurement.answers)


def _measurement_json(measurement: Measurement[Answer]) -> dict[str, object]:
    return {
        "right": _num_right(measurement),
        "answers": [
            {
                "needle": answer.placed.needle.name,
                "token_offset": answer.placed.token_offset,
                "number": answer.placed.needle.code,
                "completion": answer.completion,
                "right": answer.is_right,
            }
            for answer in measurement.answers
        ],
        "prefill_seconds": measurement.prefill_seconds,
        "seconds_per_token": measurement.seconds_per_token,
    }


def _verdict(answer: Answer) -> Text:
    """What was answered, green and "right" or red and "wrong"."""
    shown = answer.completion.strip().partition("\n")[0][:_SHOWN_CHARS]
    if answer.is_right:
        return Text(f"{shown} right", style="green")
    return Text(f"{shown!r} wrong", style="bold red")


def _reply(reply: Reply) -> Text:
    """What was replied, shortened around the answer, green and right or red and wrong."""
    shown = " ".join(reply.text.split())
    found = reply.placed.question.find(shown)
    if found is None:
        return Text(f"{shown[:_REPLY_CHARS]!r} wrong", style="bold red")
    start, end = max(found - _REPLY_CHARS // 2, 0), found + _REPLY_CHARS // 2
    before, after = "..." if start else "", "..." if end < len(shown) else ""
    return Text(f"{before}{shown[start:end]}{after} right", style="green")


def _plan_rows(plan: TailorKVPlan, context: int) -> Iterator[tuple[str, str]]:
    budget = min(plan.budget_tokens, context)
    dense = ", ".join(map(str, plan.dense_layers)) or "none"
    sparse = ", ".join(map(str, plan.sparse_layers)) or "none"
    method = (
        "all K at 1 bit"
        if plan.index == "onebit"
        else f"{plan.critical_channels} of {plan.head_size} channels of K"
    )
    yield f"dense layers ({dense})", f"all {context:,} tokens at {plan.bits} bit"
    yield (
        f"sparse layers ({sparse})",
        f"{budget:,} of {context:,} tokens exactly ({budget / context:.1%}), "
        f"found through {method}",
    )
    full, host, derived = (
        plan.full_bytes_per_token,
        plan.host_bytes_per_token,
        plan.derived_bytes_per_token,
    )
    yield "full-precision K/V, as vLLM keeps it", f"{full:,.0f} bytes a token"
    yield "host tier", f"{host:,.0f} bytes a token"
    yield (
        "derived tier (device memory on a GPU)",
        f"{derived:,.0f} bytes a token ({derived / full:.1%} of full precision)",
    )
    yield (
        f"the cache holds (placement {plan.placement})",
        f"{plan.num_tokens:,} tokens in {plan.num_blocks:,} blocks of {plan.block_size}",
    )
