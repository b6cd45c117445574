"""What a server's log says of us."""

from vllm_tailorkv.demo.server import VllmServer


def our_lines(server: VllmServer) -> list[str]:
    """What we have logged, without times and processes."""
    lines = (line.partition("] ")[2] for line in server.log.read_text().splitlines())
    return [line for line in lines if line.startswith("TailorKV")]


def assert_brief(server: VllmServer) -> None:
    """What is to be known stands there once, in a few lines."""
    lines = our_lines(server)
    assert len(lines) <= 6, lines
    assert len(set(lines)) == len(lines), lines
    for words in ("dense layers", "attended in full", "host tier:", "one request may have"):
        assert sum(words in line for line in lines) == 1, (words, lines)
