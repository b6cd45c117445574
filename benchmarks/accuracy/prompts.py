"""How an example becomes what a model reads: a text to be gone on with, or a chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import GenerationConfig

from accuracy.tasks import Example, Turn

_CONTEXT, _ANSWER = "@@CONTEXT@@", "@@ANSWER@@"


@dataclass(frozen=True)
class Prompt:
    """An example as text: the context, read as a prompt, and what goes before each answer.

    questions: one a turn, without what the answer begins with.
    """

    context: str
    questions: tuple[str, ...]


class Form(Protocol):
    """A way to put questions to a model."""

    @property
    def chat(self) -> bool:
        """Tasks word their questions for a chat."""
        ...

    @property
    def room(self) -> int:
        """Tokens that an answer may be longer than the right one."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    def prompt(self, example: Example, conversation: bool) -> Prompt:
        """The example as text."""
        ...


@dataclass(frozen=True)
class Completion:
    """The context and its questions as they are: a text that the model goes on with."""

    chat: bool = False
    room: int = 4
    ends: frozenset[int] = frozenset()

    def prompt(self, example: Example, conversation: bool) -> Prompt:
        """See `Form.prompt`."""
        del conversation
        return Prompt(example.context, tuple(turn.question for turn in example.turns))


@dataclass(frozen=True)
class Chat:
    """The user's message is instruction, context and question, in the model's own template.

    tokenizer: has a chat template.
    ends: of the model's generation config, beside the tokenizer's end of sequence.
    """

    tokenizer: Any
    ends: frozenset[int]
    chat: bool = True
    room: int = 48

    def prompt(self, example: Example, conversation: bool) -> Prompt:
        """See `Form.prompt`. The context is cut off before the blank line that ends it."""
        if conversation:
            head, questions = self._render(example.instruction, example.turns)
        else:
            each = [self._render(example.instruction, [turn]) for turn in example.turns]
            head, questions = each[0][0], [questions[0] for _, questions in each]
        return Prompt(head + example.context.rstrip("\n"), tuple(questions))

    def _render(self, instruction: str, turns: Sequence[Turn]) -> tuple[str, list[str]]:
        """What stands before the context, and what stands before each answer."""
        first, *others = turns
        user = f"{instruction}\n\n{_CONTEXT}\n\n{first.question}"
        messages = [{"role": "user", "content": user}]
        for turn in others:
            messages.append({"role": "assistant", "content": _ANSWER})
            messages.append({"role": "user", "content": turn.question})
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        head, _, rest = text.partition(_CONTEXT)
        return head, rest.split(_ANSWER)


COMPLETION = Completion()


def form_of(tokenizer: Any, model: Path) -> Form:
    """A chat where the tokenizer has a template for it."""
    if not tokenizer.chat_template:
        return COMPLETION
    ends = {tokenizer.eos_token_id}
    # Asked for a file that is not there, transformers would look for it on the network.
    has_config = (model / "generation_config.json").is_file()
    told = GenerationConfig.from_pretrained(model).eos_token_id if has_config else None
    ends |= set(told if isinstance(told, list) else [told])
    return Chat(tokenizer, frozenset(ends - {None}))
