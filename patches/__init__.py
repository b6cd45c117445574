"""The few seams that vLLM lacks, each a small guarded record (see `record.py`)."""
