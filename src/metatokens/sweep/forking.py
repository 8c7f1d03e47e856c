"""Commands that start at once: forks of a server that has imported what they need.

The imports take seconds: a third of a small training, and more of an evaluation. The server makes them once, and forks
a process for each command, with an exit code, a processor time and a process group of its own. When the server has
ended, in whatever way, its forks get SIGTERM, on which a training saves a checkpoint; and the server ends with the
process that started it. So no run goes on when nobody waits for it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from metatokens.errors import ResourceError
from metatokens.training.signals import ALWAYS, UNLESS_HANDLED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

_COMMANDS = "metatokens.cli"  # by name, since the command line imports this package
_IMPORTED = (
    _COMMANDS,
    "metatokens.evaluation.perplexity",
    "metatokens.evaluation.recall",
    "metatokens.training.finetuning",
    "metatokens.training.pretraining",
)
_STOP_SIGNALS = {*ALWAYS, *UNLESS_HANDLED}
_POLL_SECONDS = 0.1
_POLL_PARENT_SECONDS = 0.5


class ForkServer:
    """A process that forks `metatokens` commands, begun with the first of them; a context manager."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take the environment of the server; variables that count at import have to be in it."""
        self._environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        """The server's, from the first command on."""

    def __enter__(self) -> ForkServer:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the server."""
        if self.process is not None:
            self._channel.close()
            self.process.wait()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], output: int, log: int) -> ForkedCommand:
        """Start `metatokens` with these arguments.

        Args:
            arguments: the command line, without the program.
            environment: variables that differ from the server's.
            output: descriptor of its standard output.
            log: descriptor of its standard error.

        Raises:
            ResourceError: the server has ended.
        """
        if self.process is None:
            self.process = self._begin()
        report, reporting = os.pipe()
        request = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode() + b"\n"
        with os.fdopen(reporting, "wb"), contextlib.suppress(ConnectionError):  # the server has ended
            socket.send_fds(self._channel, [request[:1]], [output, log, reporting])
            self._channel.sendall(request[1:])
            if number := self._channel.recv(32):
                return ForkedCommand(int(number), report)
        os.close(report)
        raise ResourceError.plain(
            "sweep",
            happened=f"the process that starts the runs has ended with code {self.process.wait()}",
            remedy="the same command continues",
        )

    def _begin(self) -> subprocess.Popen[bytes]:
        self._channel, theirs = socket.socketpair()
        # signals that end a job often go to all its processes: the server has to outlive them, and a fork gets one that
        # comes too early once it has begun
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            with theirs:
                return subprocess.Popen(
                    [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Ctrl-C reaches a fork only once, through the process that started the server; Linux gives a new
                    # session its own share of the processor, whatever the niceness
                    process_group=0,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ForkedCommand:
    """A command under way."""

    def __init__(self, pid: int, report: int) -> None:
        """Take the number of its process and the descriptor that tells its end."""
        self.pid = pid
        self.returncode: int | None = None
        """As of `subprocess.Popen`."""
        self.cpu_seconds = 0.0
        """Processor time in seconds, of a command that has ended."""
        self._report = os.fdopen(report, "rb")

    def poll(self) -> int | None:
        """Return the exit code of a command that has ended; None while it runs."""
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            with self._report:
                line = self._report.readline()
            # no line: the server was killed, and the fork, which holds the pipe too, has ended by SIGTERM since
            self.returncode, self.cpu_seconds = json.loads(line) if line else (-signal.SIGTERM, 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # ended, but not yet reported
                os.kill(self.pid, number)


def serve(descriptor: int) -> None:
    """Fork the commands that come in, until the other end of the channel is closed.

    Args:
        descriptor: of a Unix socket. A request is a line of JSON with three descriptors: standard output, standard
            error, and a pipe that gets the exit code and the processor time. The answer is the process's number.
    """
    if sys.platform != "darwin":  # whose own libraries break in a fork that they were used before
        for module in _IMPORTED:
            importlib.import_module(module)
        gc.freeze()  # a fork's collector would write to all pages that it shares
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide the ends of forks
    server, reports = os.getpid(), dict[int, int]()
    with socket.socket(fileno=descriptor) as channel:
        while True:
            ready, _, _ = select.select([channel], [], [], _POLL_SECONDS if reports else None)
            _report_ended(reports)
            if not ready:
                continue
            request, descriptors = _receive(channel)
            if request is None:
                return
            output, log, report = descriptors
            pid = os.fork()
            if pid == 0:
                for other in reports.values():
                    os.close(other)
                channel.close()
                _run(request, output, log, server)
            reports[pid] = report
            channel.sendall(str(pid).encode())
            os.close(output)
            os.close(log)


def _receive(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Return a request and its descriptors; None if the channel is closed."""
    data, descriptors, _, _ = socket.recv_fds(channel, 1, 3)
    while data and not data.endswith(b"\n"):
        more = channel.recv(65536)
        if not more:
            return None, []
        data += more
    return (json.loads(data) if data else None), descriptors


def _report_ended(reports: dict[int, int]) -> None:
    """Tell the exit code and the processor time of forks that have ended, and forget them.

    Args:
        reports: the descriptor to write to, by the number of the process.
    """
    while reports:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        report = reports.pop(pid, None)
        if report is None:  # a process that an import has started
            continue
        ended = [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(report, json.dumps(ended).encode() + b"\n")
        os.close(report)


def _run(request: dict[str, Any], output: int, log: int, server: int) -> NoReturn:
    """Be a command, in a fork, and end."""
    os.setpgid(0, 0)
    for descriptor, own in ((output, 1), (log, 2)):
        os.dup2(descriptor, own)
        os.close(descriptor)
    os.environ.update(request["environment"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    _follow(server)
    sys.argv = ["metatokens", *request["arguments"]]
    sys.exit(importlib.import_module(_COMMANDS).main())


def _follow(parent: int) -> None:
    """Send this process SIGTERM when its parent has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
