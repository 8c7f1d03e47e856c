"""`python -m metatokens.sweep.child VERB ...`: a command of `metatokens` that does not outlive what started it.

It is the command line itself, with a thread that looks for the parent. Once that is gone, however it ended, this
process gets SIGTERM, on which a training saves a checkpoint and ends: no run goes on that nobody waits for.
"""

import os
import runpy
import signal
import sys
import threading
import time

_LOOK_SECONDS = 0.5


def follow_parent() -> None:
    """Send this process SIGTERM when its parent has ended."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="parent", daemon=True).start()


if __name__ == "__main__":
    follow_parent()
    sys.argv[0] = "metatokens"
    runpy.run_module("metatokens.cli", run_name="__main__")
