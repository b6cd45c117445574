"""What a server's log says of us."""

import re

from vllm_tailorkv.demo.server import VllmServer


VLLMS = ("non-default args", "Initializing a", "Registered new attention backend")


def our_lines(server: VllmServer) -> list[str]:
    """Lines that name us, without times and processes."""
    lines = server.log.read_text().splitlines()
    return [line.partition("] ")[2] for line in lines if re.search(r"\] .*tailorkv", line, re.I)]


def assert_brief(server: VllmServer) -> None:
    """What is to be known stands there once, in a few lines."""
    lines = our_lines(server)
    # vLLM's own, which our name or options stand in.
    lines = [line for line in lines if not line.startswith(VLLMS)]
    assert len(lines) <= 6, lines
    assert len(set(lines)) == len(lines), lines
    for words in ("dense layers", "attended in full", "host tier:", "one request may have"):
        assert sum(words in line for line in lines) == 1, (words, lines)
