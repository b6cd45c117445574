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
            turns.append(Turn(f"\nAbout {key}:", f" {answer}\n", (answer,)))
        return Example("".join(pieces), tuple(turns))


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
            passage = ""
            while source.count_tokens(passage) < size:
                passage += next(source.lines)
            facts.append(f"Passage {key}:\n{passage}End.\n")
            # Every line is worth the same.
            whole = tuple(dict.fromkeys(passage.split("\n")[:-1]))
            turns.append(Turn(f"\nPassage {key}:\n", f"{passage}End.\n", whole))
        reserved = sum(source.count_tokens(t.question + t.answer) for t in turns)
        context = source.haystack(facts, num_tokens - reserved, source.lines)
        return Example(context, tuple(turns))
