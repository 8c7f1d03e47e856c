"""Encoding text in several processes, with results in the order of the texts.

Each process is a Python of its own that reads batches of text from a pipe and writes their ids to another. Nothing is
pickled and no script is imported again, so it works from any script, notebook or command. A process ends when its pipe
ends, so none outlives the one that started it, even if that one is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from metatokens.data.tokenizer import TextEncoder, require_utf8, tokenizer_from_json
from metatokens.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from metatokens.data.byte_level import TokenIds

_WAITING_CHARACTERS = 8 << 20  # text that waits or is at work for each process: about two batches
_START = "import sys; sys.path[:] = {path!r}; from metatokens.data.encoding_processes import serve; serve()"
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Batch(Protocol):
    """Texts that are encoded together."""

    @property
    def texts(self) -> Sequence[str]:
        """The texts."""


_Batch = TypeVar("_Batch", bound=Batch)


def encode_batches(batches: Iterable[_Batch], encoder: TextEncoder) -> Generator[tuple[_Batch, list[TokenIds]]]:
    """Encode batches one by one in this process, and yield each with its ids."""
    for batch in batches:
        yield batch, encoder.encode_batch(batch.texts)


def encode_batches_in_processes(
    batches: Iterable[_Batch], tokenizer_json: bytes, num_processes: int
) -> Generator[tuple[_Batch, list[TokenIds]]]:
    """Do the same as `encode_batches`, in the same order, in several processes.

    Batches are drawn while others are at work, as long as fewer than 8 Mi characters for each process wait.

    Raises:
        ResourceError: A process could not start or encode its texts, or has ended.
        DataError: A text holds a lone surrogate, which UTF-8 cannot express.
    """
    pending: deque[tuple[_Batch, int, Future[list[TokenIds]]]] = deque()
    num_waiting = 0
    with ThreadPoolExecutor(num_processes) as pool, _processes(tokenizer_json, num_processes) as encode:
        for batch in batches:
            size = sum(map(len, batch.texts))
            pending.append((batch, size, pool.submit(encode, batch.texts)))
            num_waiting += size
            while num_waiting > num_processes * _WAITING_CHARACTERS:
                first, size, ids = pending.popleft()
                num_waiting -= size
                yield first, ids.result()
        for first, _, ids in pending:
            yield first, ids.result()


class _Process:
    """A process that encodes; `serve` is what it runs."""

    def __init__(self, tokenizer_json: bytes) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `kill` closes it
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # one thread each: `tokenizers` would start one for every core
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )
        except OSError as error:
            self._errors.close()
            raise _failure("encoding process", "one that starts", error.strerror or str(error)) from error
        if self._popen.stdin is None or self._popen.stdout is None:
            raise AssertionError("both are pipes")
        self._requests, self._replies = self._popen.stdin, self._popen.stdout
        self._send([tokenizer_json])

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        for text in texts:
            require_utf8(text)
        self._send([text.encode() for text in texts])
        error, *ids = self._receive()
        if error:
            raise self._no_ids(error.decode())
        return [np.frombuffer(piece, dtype="<u4") for piece in ids]

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        for file in (self._requests, self._replies, self._errors):
            with suppress(BrokenPipeError):  # it had not read everything
                file.close()

    def _send(self, pieces: Sequence[bytes]) -> None:
        with suppress(BrokenPipeError):  # it has ended; `_receive` says why
            _write_pieces(self._requests, pieces)

    def _receive(self) -> list[bytes]:
        pieces = _read_pieces(self._replies)
        if pieces is not None:
            return pieces
        code = self._popen.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise self._no_ids(last or (f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"))

    def _no_ids(self, found: str) -> ResourceError:
        return _failure(f"encoding process {self._popen.pid}", "the ids of its texts", found)


def _failure(process: str, expected: str, found: str) -> ResourceError:
    remedy = "use fewer --jobs, which need less memory, or report the error"
    return ResourceError(process, expected=expected, found=found, remedy=remedy)


@contextmanager
def _processes(tokenizer_json: bytes, number: int) -> Iterator[Callable[[Sequence[str]], list[TokenIds]]]:
    """Yield a function that encodes in any process that is free; threads may call it at the same time."""
    free: SimpleQueue[_Process] = SimpleQueue()
    processes: list[_Process] = []

    def encode(texts: Sequence[str]) -> list[TokenIds]:
        process = free.get()
        try:
            return process.encode(texts)
        finally:
            free.put(process)

    try:
        for _ in range(number):
            processes.append(_Process(tokenizer_json))
            free.put(processes[-1])
        yield encode
    finally:
        for process in processes:
            process.kill()  # it has nothing to lose


def serve() -> None:
    """Encode what comes from standard input, until it ends: the work of one process."""
    for number in _IGNORED:  # they go to all processes of a job; the one that started this one decides
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the ids
    requests = sys.stdin.buffer
    first = _read_pieces(requests)
    encoder = TextEncoder(tokenizer_from_json(first[0], "tokenizer"), threads=1) if first else None
    while encoder is not None and (texts := _read_pieces(requests)) is not None:
        try:
            ids = encoder.encode_batch([text.decode() for text in texts])
            reply = [b"", *(piece.astype("<u4").tobytes() for piece in ids)]
        except Exception as error:  # noqa: BLE001 - the one that waits raises it
            reply = [f"{type(error).__name__}: {error}".encode(errors="replace")]
        _write_pieces(replies, reply)


def _write_pieces(file: IO[bytes], pieces: Sequence[bytes]) -> None:
    """Write the number of pieces and their lengths, each little-endian uint64, and then the pieces."""
    file.write(np.array([len(pieces), *map(len, pieces)], dtype="<u8").tobytes())
    for piece in pieces:
        file.write(piece)
    file.flush()


def _read_pieces(file: IO[bytes]) -> list[bytes] | None:
    """Read what `_write_pieces` wrote; None if the file ends before that."""
    if len(head := file.read(8)) < 8:
        return None
    number = int.from_bytes(head, "little")
    if len(head := file.read(8 * number)) < 8 * number:
        return None
    lengths = np.frombuffer(head, dtype="<u8").tolist()
    pieces = [file.read(length) for length in lengths]
    return pieces if [len(piece) for piece in pieces] == lengths else None
