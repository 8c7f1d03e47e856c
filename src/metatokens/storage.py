"""Files and folders that are there whole or not at all: checks, atomic writers, digests and locks.

A check touches nothing, so a dry run makes it too. What is written goes to a hidden name beside its final one, is
flushed to the disk, and is then renamed; the folder that holds the name is flushed last. `keep_elsewhere` is for what
no check can know, such as a disk that others fill meanwhile.
"""

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from metatokens.errors import FULL_DISK, MetaTokensError, ResourceError, UsageError

if TYPE_CHECKING:
    from filelock import FileLock

LEAST_BYTES = 2**20
"""Room that results need at least."""


def check_folder(path: Path, *, num_bytes: int = LEAST_BYTES) -> None:
    """Check that a folder can be written, or made where there is none.

    Raises:
        UsageError: something else is in the way, a link leads nowhere, or writing is not allowed.
        ResourceError: less than `num_bytes` are free.
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
    """Check that a file can be written, and its folder made where there is none.

    Raises:
        UsageError: a folder is in the way, or writing is not allowed.
        ResourceError: less than `num_bytes` are free.
    """
    _nearest_existing(path, "file")
    if path.is_dir():
        raise not_writable(path, "file", errno.EISDIR)
    _nearest_existing(_temporary(path), "file")  # its name may be too long where that of the file is not
    target = path.resolve()
    if target.exists():
        _check_access(path, target, "file")
    if _is_replaced(target):
        check_folder(target.parent, num_bytes=num_bytes)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; one that is there stays.

    Raises:
        UsageError: if it cannot be made.
        ResourceError: if the disk is full.
    """
    with _one_line_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all; what a link points to, or a device, is written.

    Raises:
        ResourceError: if it cannot be written, as on a full disk; what was there before stays.
    """
    path = path.resolve()
    temporary = _temporary(path)
    try:
        if not _is_replaced(path):
            path.write_text(text, encoding="utf-8")
            return
        temporary.unlink(missing_ok=True)  # of a process that was killed
        write_durably(temporary, text.encode())
        commit(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError.no_room(path, error) from None


def write_durably(path: Path, content: bytes) -> None:
    """Create a file with this content and flush it to the disk; an existing one is refused."""
    with path.open("xb") as file:
        file.write(content)
        flush_to_disk(file)


def flush_to_disk(file: IO[bytes]) -> None:
    """Flush what was written into an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def commit(temporary: Path, final: Path) -> None:
    """Rename a file or a folder whose files are on the disk, and flush its entry and the new name to the disk."""
    _sync(temporary)
    os.replace(temporary, final)
    with suppress(PermissionError):  # a folder may be open to writing but not to reading
        _sync(final.parent)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `final` at the end, complete and on disk, or is removed.

    Raises:
        ResourceError: if it cannot be written, as on a full disk.
    """
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        commit(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors and tokenizers raise types of their own for a full disk
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        raise ResourceError.no_room(final, error) from None


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted `new_folder` left behind; call under the lock of the folder."""
    for path in folder.glob(".*.tmp-*"):
        shutil.rmtree(path)


def file_sha256(file: Path | int) -> str:
    """Return the hex SHA-256 of a file; a descriptor is closed."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def json_sha256(document: Any) -> str:
    """Return the hex SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@contextmanager
def hold_lock(lock: Path, *, folder: Path, work: str) -> Iterator[None]:
    """Hold a lock file, made with its folder where there is none; the lock ends with the process, however that ends.

    Args:
        lock: the file; it names its holder.
        folder: what the lock protects, for messages.
        work: what another process does that holds it, for messages.

    Raises:
        UsageError: if another process holds the lock, or the file cannot be written.
        ResourceError: if the disk is full.
    """
    from filelock import Timeout

    held = _file_lock(lock)
    with _one_line_errors(folder):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except Timeout:
            raise UsageError.plain(
                str(folder),
                happened=f"{work} ({_holder(lock)})",
                remedy="wait for it to end or choose another --out",
            ) from None
    try:
        with suppress(OSError):  # on a full disk the lock has no name; what is written next says why
            lock.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        held.release()


def lock_holder(lock: Path) -> str:
    """Return which process holds a lock file; empty where none does."""
    from filelock import Timeout

    if not lock.exists():
        return ""
    try:
        with _file_lock(lock):
            return ""
    except Timeout:
        return _holder(lock)


def keep_elsewhere(path: Path, write: Callable[[Path], None]) -> None:
    """Write a result by `write(path)`; where that fails, write it into a folder for temporary files and name it.

    Raises:
        ResourceError: it could not be written to `path`; the message says where it is now.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except (OSError, ResourceError) as problem:
        kept = Path(tempfile.mkdtemp(prefix="metatokens-")) / path.name
        write(kept)
        # one of ours says itself which path it is
        found = str(problem) if isinstance(problem, MetaTokensError) else f"{problem.strerror} for {path}"
        raise ResourceError(
            str(path), expected="room to write it", found=found, remedy=f"the result is not lost: it is {kept}"
        ) from None


def not_writable(path: Path, kind: str, number: int) -> UsageError:
    """Return the error of a file or folder that cannot be written, for the reason that `number` of errno has."""
    return UsageError(
        str(path), expected=f"a {kind} that can be written", found=os.strerror(number), remedy="choose another --out"
    )


def to_json(document: Any, *, indent: int | None = 2) -> str:
    """Write JSON that every reader takes: a number that is not finite is null, and a warning names its key."""
    unknown: list[str] = []
    text = json.dumps(_with_nulls(document, "", unknown), indent=indent, default=str, allow_nan=False)
    if unknown:
        warnings.warn(f"no finite number, so null in the JSON: {', '.join(unknown)}", stacklevel=2)
    return text


def _file_lock(lock: Path) -> "FileLock":
    from filelock import FileLock

    # a soft lock, for a disk that has no flock, would outlive a process that is killed
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


def _sync(path: Path) -> None:
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
    """Tell whether a new file takes the place of the old one: not of a device or a pipe, nor of a mounted file."""
    return not path.exists() or (path.is_file() and not os.path.ismount(path))


def _nearest_existing(path: Path, kind: str) -> Path:
    """Return the path itself or the nearest folder above it that exists, where names of the rest can be."""
    longest = 0
    for candidate in (path, *path.absolute().parents):
        try:
            candidate.lstat()
            if candidate.is_dir() and longest > os.pathconf(candidate, "PC_NAME_MAX"):
                raise not_writable(path, kind, errno.ENAMETOOLONG)
        except (FileNotFoundError, NotADirectoryError):
            longest = max(longest, len(os.fsencode(candidate.name)))
            continue
        except OSError as error:  # too long a name, or a folder that may not be looked into
            raise not_writable(path, kind, error.errno or 0) from None
        except ValueError:  # a NUL
            raise not_writable(path, kind, errno.EINVAL) from None
        return candidate
    raise AssertionError("there is always a root")


def _check_access(path: Path, existing: Path, kind: str) -> None:
    wanted = os.W_OK | os.X_OK if existing.is_dir() else os.W_OK
    if not os.access(existing, wanted):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        raise not_writable(path, kind, errno.EROFS if is_read_only else errno.EACCES)
