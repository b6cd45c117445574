"""What the speed benchmarks share: shapes, pages, vLLM's attention, rounds, lines, pictures."""
