"""Files and folders that are complete or absent: checks, atomic writers, digests and locks.

The checks write nothing, so dry runs make them too. The writers write under a hidden name beside the final one, flush
to the disk, rename, and flush the folder that holds the name; none follows a link that lies in the place of its file.
A sealed file begins with the digest of its own text, so that it is never read after it was altered (`write_sealed`).
`keep_elsewhere` covers failures that no check can foresee, such as a disk that other processes fill meanwhile.
"""

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from metatokens.errors import FULL_DISK, DataError, MetaTokensError, ResourceError, UsageError

if TYPE_CHECKING:
    from filelock import FileLock

LEAST_BYTES = 2**20
"""Free space that results need at least."""
_POLL_SECONDS = 0.5  # between two looks at a lock that another process holds
_LARGEST_SEALED = 1 << 28
# how a seal stands at the start of a file: what the text begins with, what stands before and behind the digest
_SEALS = (
    ("{", '{"sha256": "', '",'),
    ("", "# sha256 ", " of the lines below; remove this line if you change them\n"),
)
_HEX_DIGITS = 64
_DIGEST = re.compile(rf"[0-9a-f]{{{_HEX_DIGITS}}}")


def check_folder(path: Path, *, num_bytes: int = LEAST_BYTES) -> None:
    """Check that a folder can be written, or made if it does not exist.

    Raises:
        UsageError: a file is in its place, a link leads nowhere, or writing is not allowed.
        ResourceError: fewer than `num_bytes` are free.
    """
    existing = _nearest_existing(path, "folder")
    if not existing.is_dir():  # a file, or a link to nothing
        raise not_writable(path, "folder", errno.ENOENT if existing.is_symlink() else errno.ENOTDIR)
    _check_access(path, existing, "folder")
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ResourceError(
            str(path),
            expected=f"{num_bytes} bytes free",
            found=str(free),
            remedy="free some space or choose another --out",
        )


def check_file(path: Path, *, num_bytes: int = LEAST_BYTES) -> None:
    """Check that a file can be written, and its folder made if it does not exist.

    Raises:
        UsageError: a folder is in its place, or writing is not allowed.
        ResourceError: fewer than `num_bytes` are free.
    """
    _nearest_existing(path, "file")
    if path.is_dir():
        raise not_writable(path, "file", errno.EISDIR)
    _nearest_existing(_temporary(path), "file")  # the hidden name is longer, so it alone may be too long
    target = path.resolve()
    if target.exists():
        _check_access(path, target, "file")
    if _is_replaced(target):
        check_folder(target.parent, num_bytes=num_bytes)


def make_folder(path: Path) -> None:
    """Make a folder and its parents; an existing folder stays as it is.

    Raises:
        UsageError: the folder cannot be made.
        ResourceError: the disk is full.
    """
    with _one_line_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file that is complete or absent; a link is replaced, a device or pipe is written directly.

    Raises:
        ResourceError: the file cannot be written, as on a full disk; its old content stays.
    """
    temporary = _temporary(path)
    content = content.encode() if isinstance(content, str) else content
    try:
        if not (path.is_symlink() or _is_replaced(path)):
            with open(path, "wb", opener=no_follow) as file:
                file.write(content)
            return
        temporary.unlink(missing_ok=True)  # left by a process that was killed
        write_durably(temporary, content)
        commit(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError.no_room(path, error) from None


def write_sealed(path: Path, text: str) -> None:
    """Write a small JSON or YAML file as `write_atomically` does, headed by its own digest; `read_sealed` reads it.

    A seal stops accidents, not attackers: whoever changes the text can change the digest.

    Raises:
        ResourceError: the file cannot be written, as on a full disk; its old content stays.
    """
    write_atomically(path, seal(text))


def read_sealed(path: Path, *, remedy: str) -> str:
    """Return the text that `write_sealed` was given; a file without a seal is returned as it is.

    Raises:
        DataError: the file cannot be read, is not UTF-8, is larger than 256 MiB, or is not what was written.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_SEALED + 1)
        if len(content) > _LARGEST_SEALED:
            raise ValueError(f"more than {_LARGEST_SEALED} bytes")
        text = content.decode()
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(str(path), expected="a readable text file", found=found, remedy=remedy) from None
    return unseal(text, str(path), remedy=remedy)


def seal(text: str) -> str:
    """Return a text headed by its SHA-256: a JSON object gets it as a key, any other text as a comment line."""
    start, before, behind = next(form for form in _SEALS if text.startswith(form[0]))
    return before + text_sha256(text) + behind + text[len(start) :]


def unseal(text: str, name: str, *, remedy: str, error: type[MetaTokensError] = DataError) -> str:
    """Return a text without its seal, if it has one.

    Raises:
        DataError, or `error`: naming the file, if the text is not the one that was sealed, or the mark of its seal
            is damaged.
    """
    for start, before, behind in _SEALS:
        expected, rest = text[len(before) :][:_HEX_DIGITS], text[len(before) + _HEX_DIGITS :]
        if text.startswith(before) or _DIGEST.fullmatch(expected):
            if not text.startswith(before):
                raise error(name, expected=f"{before!r} before its SHA-256", found="a damaged head", remedy=remedy)
            found = text_sha256(start + rest.removeprefix(behind))
            if found != expected or not rest.startswith(behind):
                raise error(
                    name, expected=f"its text to have the SHA-256 {expected} of its head", found=found, remedy=remedy
                )
            return start + rest.removeprefix(behind)
    return text


def is_sealed(path: Path) -> bool:
    """Tell whether a file has a seal, which may be broken."""
    with path.open("rb") as file:
        head = file.read(max(len(before) for _, before, _ in _SEALS)).decode(errors="replace")
    return any(head.startswith(before) for _, before, _ in _SEALS)


def write_durably(path: Path, content: bytes) -> None:
    """Create a file with this content and flush it to the disk; an existing one is refused."""
    with path.open("xb") as file:
        file.write(content)
        flush_to_disk(file)


def no_follow(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=no_follow)`; a link in its place is an OSError (ELOOP)."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def flush_to_disk(file: IO[bytes]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def commit(temporary: Path, final: Path) -> None:
    """Rename a file, or a folder with files, that is flushed already, and flush the rename to the disk."""
    flush_path(temporary)
    os.replace(temporary, final)
    with suppress(PermissionError):  # a folder may be open to writing but not to reading
        flush_path(final.parent)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a hidden folder that is renamed to `final` at the end, complete and on disk; an error removes it.

    Raises:
        ResourceError: the folder cannot be written, as on a full disk.
    """
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            flush_path(path)
        commit(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # on a full disk safetensors and tokenizers raise errors of their own types
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        raise ResourceError.no_room(final, error) from None


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted `new_folder` left behind; call under the lock of the folder."""
    for path in folder.glob(".*.tmp-*"):
        shutil.rmtree(path)


def file_sha256(file: Path | int) -> str:
    """Return the hex SHA-256 of a file, given by path or by descriptor; a descriptor is closed."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """Return the hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_sha256(document: Any) -> str:
    """Return the hex SHA-256 of plain JSON values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@contextmanager
def hold_lock(lock: Path, *, folder: Path, work: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock on a lock file, and make the file and its folder first if they do not exist.

    However the process ends, the lock ends with it.

    Args:
        lock: the file; it names its holder.
        folder: the folder that the lock protects, for messages.
        work: the message if another process holds the lock, such as "another run uses this folder".
        waiting: called with a line of text if another process holds the lock, which is then waited for; None refuses.

    Raises:
        UsageError: another process holds the lock and is not waited for, or the file cannot be written.
        ResourceError: the disk is full.
    """
    from filelock import Timeout

    held = _file_lock(lock)
    with _one_line_errors(folder):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except Timeout:
            if waiting is None:
                raise UsageError.plain(
                    str(folder),
                    happened=f"{work} ({_holder(lock)})",
                    remedy="wait for it to end or choose another --out",
                ) from None
            waiting(f"{folder}: {work} ({_holder(lock)}); waiting for it to end")
            held.acquire(timeout=-1, poll_interval=_POLL_SECONDS)
    try:
        # on a full disk the holder stays unnamed; the next write reports the full disk
        with suppress(OSError), open(lock, "w", opener=no_follow) as file:
            file.write(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        held.release()


def lock_holder(lock: Path) -> str:
    """Return which process holds a lock file; empty if none does."""
    from filelock import Timeout

    if not lock.exists():
        return ""
    try:
        with _file_lock(lock):
            return ""
    except Timeout:
        return _holder(lock)


def keep_elsewhere(path: Path, write: Callable[[Path], None]) -> None:
    """Write a result by `write(path)`; if that fails, write it into a temporary folder instead.

    Raises:
        ResourceError: the result could not be written to `path`; the message says where it is now.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except (OSError, ResourceError) as problem:
        kept = Path(tempfile.mkdtemp(prefix="metatokens-")) / path.name
        write(kept)
        # an error of this package names its path itself
        found = str(problem) if isinstance(problem, MetaTokensError) else f"{problem.strerror} for {path}"
        raise ResourceError(
            str(path), expected="room to write it", found=found, remedy=f"the result is not lost: it is in {kept}"
        ) from None


def not_writable(path: Path, kind: str, number: int) -> UsageError:
    """Return the error for a file or folder that cannot be written; `number` is the errno of the reason."""
    return UsageError(
        str(path), expected=f"a {kind} that can be written", found=os.strerror(number), remedy="choose another --out"
    )


def to_json(document: Any, *, indent: int | None = 2) -> str:
    """Return JSON that every reader accepts: numbers that are not finite become null, with a warning."""
    unknown: list[str] = []
    text = json.dumps(_with_nulls(document, "", unknown), indent=indent, default=str, allow_nan=False)
    if unknown:
        warnings.warn(f"no finite number, so null in the JSON: {', '.join(unknown)}", stacklevel=2)
    return text


def _file_lock(lock: Path) -> "FileLock":
    from filelock import FileLock

    # a soft lock, the fallback on a disk without flock, would outlive a process that is killed
    return FileLock(lock, timeout=0, fallback_to_soft=False)


def _holder(lock: Path) -> str:
    with suppress(FileNotFoundError):  # its holder may just have removed it
        return lock.read_text(errors="replace").strip() or "another process"
    return "another process"


@contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise ResourceError.no_room(folder, error) from None
        raise not_writable(folder, "folder", error.errno or 0) from None


def flush_path(path: Path) -> None:
    """Flush a file or folder that is not open to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _with_nulls(value: Any, key: str, unknown: list[str]) -> Any:
    if isinstance(value, dict):
        return {name: _with_nulls(part, f"{key}.{name}".lstrip("."), unknown) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part, f"{key}[{index}]", unknown) for index, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        unknown.append(f"{key} {value}")
        return None
    return value


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _is_replaced(path: Path) -> bool:
    """Tell whether writing replaces the old file; a device, a pipe or a mounted file is written in place."""
    return not path.exists() or (path.is_file() and not os.path.ismount(path))


def _nearest_existing(path: Path, kind: str) -> Path:
    """Return the path itself or its nearest existing parent; refuse names that cannot be made below it."""
    longest = 0
    for candidate in (path, *path.absolute().parents):
        try:
            candidate.lstat()
            fits = not candidate.is_dir() or longest <= os.pathconf(candidate, "PC_NAME_MAX")
        except (FileNotFoundError, NotADirectoryError):
            longest = max(longest, len(os.fsencode(candidate.name)))
            continue
        except OSError as error:  # the name is too long, or a folder may not be entered
            raise not_writable(path, kind, error.errno or 0) from None
        except ValueError:  # a NUL
            raise not_writable(path, kind, errno.EINVAL) from None
        if not fits:
            raise not_writable(path, kind, errno.ENAMETOOLONG)
        return candidate
    raise AssertionError("there is always a root")


def _check_access(path: Path, existing: Path, kind: str) -> None:
    wanted = os.W_OK | os.X_OK if existing.is_dir() else os.W_OK
    if not os.access(existing, wanted):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        raise not_writable(path, kind, errno.EROFS if is_read_only else errno.EACCES)
