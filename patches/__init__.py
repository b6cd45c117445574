"""The few seams that vLLM 0.32 lacks, each a small guarded record (see `record.py`)."""
