"""A fresh process for which the package is not installed, so that a checkpoint's own code is all there is."""

import os
import subprocess
import sys
from pathlib import Path

NOT_INSTALLED = """
import sys
sys.modules["metatokens"] = None  # as far as this process can tell
"""


def run_without_the_package(program: str, *arguments: Path, folder: Path) -> None:
    """Run a program, which must end well, in a folder of its own; code of checkpoints is copied there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED + program, *map(str, arguments)],
        cwd=folder,
        env={**environment, "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
