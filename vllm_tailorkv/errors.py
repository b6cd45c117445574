"""The one exception users meet."""


class TailorKVError(Exception):
    """A configuration, model or environment that TailorKV cannot serve.

    The message is one sentence that names the option at fault and the remedy. It is no
    `ValueError`, which pydantic would wrap in a report of its own on the way through vLLM.
    """
