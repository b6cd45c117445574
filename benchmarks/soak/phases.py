"""What clients do to a server that is meant to live on: each phase returns its replies."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from soak.checks import judge_outcomes
from soak.client import FINISHED, LEFT, REFUSED, Client, Prompt, Reply
from soak.metrics import PREEMPTIONS, PREFIX_HITS
from soak.prompts import MAX_MODEL_LEN, Conversation, Prompts, malformed

_ROUNDS_OF_STREAMS = 3
_CONVERSATIONS = 4


@dataclass
class Done:
    """What a phase did.

    Args:
        replies: whose answers are compared where they are known.
        problems: found by the phase itself.
        must_grow: names of counters that must have grown.
    """

    replies: list[Reply]
    problems: list[str] = field(default_factory=list)
    must_grow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Load:
    """How much is asked.

    Args:
        streams: at once.
        num_blocks: of the KV cache.
    """

    prompts: Prompts
    streams: int
    num_blocks: int
    model: str


Phase = Callable[[Client, Load], Awaitable[Done]]


async def mixed(client: Client, load: Load) -> Done:
    """Streams of mixed lengths, all read to their end."""
    replies = await _streams(client, load, load.prompts.mixed(_ROUNDS_OF_STREAMS * load.streams))
    return Done(replies, judge_outcomes(replies, [FINISHED]))


async def cancellations(client: Client, load: Load) -> Done:
    """Clients that stop reading in the middle, among others that go on."""
    generator = random.Random(load.streams)
    leaving = load.prompts.long_answers(load.streams)
    leave = [client.ask(prompt, generator.randint(1, 40)) for prompt in leaving]
    left, stayed = await _beside(client, load, leave)
    problems = judge_outcomes(left, [LEFT]) + judge_outcomes(stayed, [FINISHED])
    return Done(left + stayed, problems)


async def disconnects(client: Client, load: Load) -> Done:
    """Connections that are reset at once, while the prompt is read, and in mid-stream."""
    prompts = load.prompts.long_answers(load.streams)
    tear = [client.tear(prompt, (0, 1, 4000)[i % 3]) for i, prompt in enumerate(prompts)]
    left, stayed = await _beside(client, load, tear)
    problems = judge_outcomes(left, [LEFT]) + judge_outcomes(stayed, [FINISHED])
    return Done(left + stayed, problems)


async def too_long(client: Client, load: Load) -> Done:
    """Prompts beyond the model's limit: refused, with the limit named."""
    ask = [client.ask(prompt) for prompt in load.prompts.too_long()]
    refused, stayed = await _beside(client, load, ask)
    problems = judge_outcomes(refused, [REFUSED]) + judge_outcomes(stayed, [FINISHED])
    for reply in refused:
        if not reply.detail.startswith("400 ") or str(MAX_MODEL_LEN) not in reply.detail:
            problems.append(f"a prompt beyond the limit got: {reply.detail[:200]}")
    return Done(refused + stayed, problems)


async def malformed_requests(client: Client, load: Load) -> Done:
    """Bodies that are wrong in many ways, beside others that are right."""
    bodies = malformed(load.model)
    post = [client.post(body.content, body.path) for body in bodies]
    refused, stayed = await _beside(client, load, post)
    problems = judge_outcomes(stayed, [FINISHED])
    for body, reply in zip(bodies, refused, strict=True):
        if reply.outcome != REFUSED:
            problems.append(f"{body.what} got {reply.outcome} {reply.detail[:200]}")
    return Done(refused + stayed, problems)


async def conversations(client: Client, load: Load) -> Done:
    """Conversations that begin alike and go on for some turns: prefixes are found."""
    talks = [load.prompts.conversation(number) for number in range(_CONVERSATIONS)]
    turns = await asyncio.gather(*(_talk(client, talk) for talk in talks))
    replies = [reply for replies in turns for reply in replies]
    return Done(replies, judge_outcomes(replies, [FINISHED]), (PREFIX_HITS,))


async def preemption(client: Client, load: Load) -> Done:
    """More at once than the cache holds."""
    prompts = load.prompts.filling(load.num_blocks)
    replies = list(await asyncio.gather(*map(client.ask, prompts)))
    return Done(replies, judge_outcomes(replies, [FINISHED]), (PREEMPTIONS,))


async def warm_up(client: Client, load: Load) -> Done:
    """All that makes a new server's memory grow: steps of every size, load, and a full cache."""
    replies = [await client.ask(prompt) for prompt in load.prompts.every_length()]
    problems = judge_outcomes(replies, [FINISHED])
    for phase in (mixed, preemption):
        done = await phase(client, load)
        replies += done.replies
        problems += done.problems
    return Done(replies, problems)


PHASES: dict[str, Phase] = {
    "mixed": mixed,
    "cancellations": cancellations,
    "disconnects": disconnects,
    "too long": too_long,
    "malformed": malformed_requests,
    "conversations": conversations,
    "preemption": preemption,
}


async def references(client: Client, load: Load) -> list[Reply]:
    """All known prompts and conversations, one request at a time."""
    replies = [await client.ask(p) for p in (*load.prompts.known, *load.prompts.known_fillings)]
    for number in range(_CONVERSATIONS):
        replies += await _talk(client, load.prompts.conversation(number))
    return replies


async def _talk(client: Client, talk: Conversation) -> list[Reply]:
    replies = []
    while not talk.is_over:
        reply = await client.ask(talk.ask())
        replies.append(reply)
        talk.hear(reply.tokens)
    return replies


async def _streams(client: Client, load: Load, prompts: Sequence[Prompt]) -> list[Reply]:
    """Ask all, so many at once."""
    slots = asyncio.Semaphore(load.streams)

    async def ask(prompt: Prompt) -> Reply:
        async with slots:
            return await client.ask(prompt)

    return list(await asyncio.gather(*map(ask, prompts)))


async def _beside(
    client: Client, load: Load, work: Sequence[Awaitable[Reply]]
) -> tuple[list[Reply], list[Reply]]:
    """What came of the work, and of streams of mixed lengths that ran beside it."""
    others, *done = await asyncio.gather(
        _streams(client, load, load.prompts.mixed(load.streams)), *work
    )
    return done, others
