"""Real text: questions whose answers are sentences of it, and long spans to be copied."""

from dataclasses import dataclass

from accuracy.tasks.base import Example, Source, Turn

_MIN_LINE_CHARS = 30


@dataclass(frozen=True)
class QuestionAnswering:
    """Real documents, each under its name, and names to look up: what is said of them?"""

    name: str = "question_answering"
    conversation: bool = False
    question_tokens: int = 60

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`."""
        budget = num_tokens - self.question_tokens * num_turns
        keys = source.keys()
        pieces: list[str] = []
        entries: list[tuple[str, str]] = []
        said: set[str] = set()
        for line in source.lines:
            new = len(line) >= _MIN_LINE_CHARS and line not in said
            said.add(line)
            piece = line
            if new and source.rng.random() < 0.3:
                key = next(keys)
                entries.append((key, line.strip()))
                piece = f"About {key}: {line}"
            budget -= source.count_tokens(piece)
            if budget < 0:
                entries = [entry for entry in entries if f"About {entry[0]}: " in "".join(pieces)]
                break
            pieces.append(piece)
        asked = source.rng.sample(entries, min(num_turns, len(entries)))
        turns = []
        for key, line in asked:
            answer = " ".join(line.split()[:8])
            if source.chat:
                question = f'One line of the text begins with "About {key}:". How does it go on?'
                turns.append(Turn(question, f" {answer}", (answer,), begun=f"About {key}:"))
            else:
                turns.append(Turn(f"\nAbout {key}:", f" {answer}\n", (answer,)))
        return Example("".join(pieces), tuple(turns), _NOTED)


_NOTED = 'Read the text below. Some of its lines begin with "About" and a name; you will be asked.'
_MARKED = "Read the text below. It holds passages, each between its name and `End.`; remember them."


def passage(source: Source, size: int) -> str:
    """Whole lines of real text, `size` tokens or a line more."""
    text = ""
    while source.count_tokens(text) < size:
        text += next(source.lines)
    return text


def whole_lines(text: str) -> tuple[str, ...]:
    """Its lines, each once: every one is worth the same."""
    return tuple(dict.fromkeys(text.split("\n")[:-1]))


@dataclass(frozen=True)
class Copy:
    """A passage between marks is to be repeated word for word."""

    name: str = "copy"
    conversation: bool = False
    passage_tokens: int = 160

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. The passage is shorter where `num_tokens` is small."""
        size = min(self.passage_tokens, num_tokens // (4 * num_turns))
        keys = source.keys()
        turns, facts = [], []
        for _ in range(num_turns):
            key = next(keys)
            text = passage(source, size)
            facts.append(f"Passage {key}:\n{text}End.\n")
            turns.append(_repeat(source, key, text))
        reserved = sum(source.count_tokens(t.question + t.answer) for t in turns)
        context = source.haystack(facts, num_tokens - reserved, source.lines)
        return Example(context, tuple(turns), _MARKED)


def _repeat(source: Source, key: str, text: str) -> Turn:
    if source.chat:
        question = f"Repeat the passage {key} word for word, line by line, up to `End.`"
        return Turn(question, f"{text}End.", whole_lines(text), begun=f"Passage {key}:\n")
    return Turn(f"\nPassage {key}:\n", f"{text}End.\n", whole_lines(text))


@dataclass(frozen=True)
class LateRecall:
    """A passage of the context is to be repeated word for word after a long text in between.

    That text is given, so that it is the same for all methods, and read by decode steps like
    everything after the context. It stands for what a model wrote itself.

    words: in between; fewer where `num_tokens` is small.
    """

    name: str = "late_recall"
    conversation: bool = False
    passage_tokens: int = 80
    words: int = 700

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. One passage, hence one turn."""
        del num_turns
        key, topic = next(source.keys()), next(source.keys())
        text = passage(source, min(self.passage_tokens, num_tokens // 8))
        between: list[str] = []
        count, most = 0, min(self.words, num_tokens // 5)
        while count < most:
            between.append(next(source.lines))
            count += len(between[-1].split())
        own = "".join(between)
        begun = f"{own}Passage {key}:\n"
        if source.chat:
            question = (
                f"First write {count} words about {topic}. After that, repeat the passage {key} "
                "word for word, line by line, up to `End.`"
            )
            turn = Turn(question, f"{text}End.", whole_lines(text), begun=begun)
        else:
            turn = Turn(f"\nAbout {topic}:\n", f"{text}End.\n", whole_lines(text), begun=begun)
        reserved = 40 + sum(map(source.count_tokens, [*between, turn.answer]))
        facts = [f"Passage {key}:\n{text}End.\n"]
        context = source.haystack(facts, num_tokens - reserved, source.lines)
        return Example(context, (turn,), _MARKED)
