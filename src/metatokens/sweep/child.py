"""`python -m metatokens.sweep.child VERB ...`: a `metatokens` command that ends with its parent process.

It is the command line itself, with a thread that watches the parent. When the parent has ended, in whatever way, this
process gets SIGTERM, on which a training saves a checkpoint and ends. So no run goes on when nobody waits for it.
"""

import os
import runpy
import signal
import sys
import threading
import time

_POLL_SECONDS = 0.5


def follow_parent() -> None:
    """Send this process SIGTERM when its parent has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    follow_parent()
    sys.argv[0] = "metatokens"
    runpy.run_module("metatokens.cli", run_name="__main__")
