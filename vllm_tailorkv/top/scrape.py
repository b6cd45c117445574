"""What a server's `/metrics` said at one moment."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

_GROWING = ("_total", "_count", "_bucket")

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Scrape:
    """Samples by name.

    Args:
        time: in seconds of a clock that does not jump.
        samples: of each name the labels and the value.
    """

    time: float
    samples: Mapping[str, tuple[tuple[Labels, float], ...]] = field(default_factory=dict)

    def of(self, name: str, **labels: str) -> Iterator[tuple[Labels, float]]:
        """The samples of a name that have these labels, whatever others they have."""
        for have, value in self.samples.get(name, ()):
            if labels.items() <= have.items():
                yield have, value

    def total(self, name: str, **labels: str) -> float:
        """Their sum, over engines and processes; 0 if there are none."""
        return sum(value for _, value in self.of(name, **labels))

    def labels(self, name: str) -> Labels:
        """The labels of the first sample of a name."""
        return next((labels for labels, _ in self.of(name)), {})

    def buckets(self, name: str) -> dict[float, float]:
        """Of a histogram: how many values were at most each bound, the last one's infinite."""
        counts: dict[float, float] = defaultdict(float)
        for labels, value in self.of(name + "_bucket"):
            counts[float(labels["le"])] += value
        return dict(sorted(counts.items()))

    def is_continued_by(self, later: "Scrape") -> bool:
        """Whether the same server can have said both: what it counts only grows."""
        return all(
            self.total(name) <= later.total(name)
            for name in self.samples
            if name.endswith(_GROWING)
        )


def parse(text: str, time: float) -> Scrape:
    """Read the text format.

    Raises:
        ValueError: it is something else.
    """
    samples: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name].append((sample.labels, sample.value))
    return Scrape(time, {name: tuple(found) for name, found in samples.items()})
