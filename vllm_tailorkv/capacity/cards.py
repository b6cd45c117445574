"""GPUs and their bandwidths, as their vendors document them."""

from dataclasses import dataclass

from vllm_tailorkv.errors import TailorKVError


@dataclass(frozen=True)
class Card:
    """A GPU.

    Args:
        name: as its vendor calls it.
        memory_gb_s: bandwidth of its memory, in GB/s (1e9 bytes).
        bus_gb_s: bandwidth of its bus in one direction, in GB/s.
    """

    name: str
    memory_gb_s: int
    bus_gb_s: int

    def step_ms(self, device_bytes: int, host_bytes: int) -> float:
        """The least time of a decode step, in ms: a layer's reads wait for each other.

        Args:
            device_bytes: what it reads from the card's memory.
            host_bytes: what it reads over the bus.
        """
        return device_bytes / self.memory_gb_s / 1e6 + host_bytes / self.bus_gb_s / 1e6


# PCI Express with 16 lanes: 5.0 has 64 GB/s in each direction, 4.0 has 32.
CARDS = (
    Card("H200 SXM", 4800, 64),
    Card("H100 SXM", 3350, 64),
    Card("A100 80GB SXM", 2039, 32),
    Card("L40S", 864, 32),
    Card("RTX 4090", 1008, 32),
    Card("RTX 3090", 936, 32),
)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def find_card(name: str) -> Card:
    """The card of a name, of which a part that no other card has is enough.

    Raises:
        TailorKVError: there is none, or there are several.
    """
    found = [card for card in CARDS if _letters(name) and _letters(name) in _letters(card.name)]
    if len(found) != 1:
        known = ", ".join(card.name for card in CARDS)
        raise TailorKVError(f"--card {name!r} is none of: {known}")
    return found[0]
