"""What command lines share."""

import argparse
import json
from typing import Any


def json_object(text: str) -> dict[str, Any]:
    """An argument that is a JSON object.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
