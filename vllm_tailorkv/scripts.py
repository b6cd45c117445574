"""Programs that come with packages, whichever way those were installed."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def find_script(name: str) -> str | None:
    """The path of a program, or None.

    First beside the Python that runs, as in an environment; then where `pip install --user` puts
    it, which few shells look through; then where the shell looks.
    """
    folders = (
        Path(sys.executable).parent,
        Path(sysconfig.get_path("scripts")),
        Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))),
    )
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path)
