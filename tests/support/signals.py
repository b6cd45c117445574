"""Programs that take signals as from a terminal."""

HEEDED = ("env", "--default-signal=HUP,INT")
"""In front of a command: what runs the tests may ignore these signals, as `nohup` and a shell's
background jobs do, and programs would inherit that."""
