"""Copies of checkpoints at an address that fsspec knows, such as s3://bucket/run, gs://... or memory://...

A copy is complete when its manifest is there, which is written last and removed first. A run whose folder has no
checkpoint or only older ones, as on a new machine, fetches the newest copy and verifies it like any other.
"""

import posixpath
import warnings
from pathlib import Path
from typing import Any

import fsspec

from metatokens.errors import CheckpointError, MetaTokensError, UsageError, redact
from metatokens.storage import new_folder
from metatokens.training.checkpoint import FILE_NAME, MANIFEST, STEP_FOLDER, step_folders


class RemoteCopies:
    """The copies of a run's checkpoints at an address."""

    def __init__(self, address: str) -> None:
        """Find the file system of the address; nothing is read yet.

        Raises:
            UsageError: there is none, or its package is not installed.
        """
        self._address = redact(address)
        try:
            self._files, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise UsageError(
                "checkpoint.copy_to",
                expected="an address that fsspec knows",
                found=f"{address!r} ({error})",
                remedy="correct it, or install the package of its file system",
            ) from None

    def update(self, folder: Path, keep_interval: int | None = None) -> None:
        """Copy what the folder has and the address lacks, and remove there what the folder has no more.

        Copies of later steps than the folder has stay, and so do those that are kept for ever: every `keep_interval`
        steps. A failure is a warning: the checkpoints of the folder are as good as before.
        """
        try:
            local = {path.name: path for path in step_folders(folder)}
            there = set(self._complete())
            for name in sorted(local.keys() - there):
                self._copy(local[name])
            newest = max(local, default="")
            for name in sorted(there - local.keys()):
                step = int(name.removeprefix("step-"))
                if name > newest or (keep_interval is not None and step % keep_interval == 0):
                    continue
                self._files.rm_file(self._path(name, MANIFEST))
                self._files.rm(self._path(name), recursive=True)
        except Exception as error:  # noqa: BLE001 - each file system raises errors of its own
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(redact(f"checkpoints are not copied to {self._address}: {problem}"), stacklevel=2)

    def fetch_newest(self, folder: Path) -> None:
        """Fetch the newest copy into a folder whose own checkpoints are all older.

        Raises:
            CheckpointError: the address cannot be read, and the folder has no checkpoint to go on from.
            ResourceError: the folder cannot be written.
        """
        newest = max((path.name for path in step_folders(folder)), default="")
        try:
            name = max(self._complete(), default="")
            if name > newest:
                with new_folder(folder / name) as temporary:
                    self._fetch(name, temporary)
        except MetaTokensError:
            raise
        except Exception as error:  # each file system raises errors of its own
            if newest:
                problem = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(redact(f"copies at {self._address} are not looked at: {problem}"), stacklevel=2)
                return
            raise CheckpointError(
                self._address,
                expected="copies of checkpoints that can be read",
                found=f"{type(error).__name__}: {error}",
                remedy="try again, or switch checkpoint.copy_to off",
            ) from error

    def _fetch(self, name: str, folder: Path) -> None:
        for path in self._files.find(self._path(name)):
            file = posixpath.relpath(path, self._path(name))
            if FILE_NAME.fullmatch(file):
                (folder / file).parent.mkdir(exist_ok=True)
                self._files.get_file(path, str(folder / file))

    def _complete(self) -> list[str]:
        """Return the names of the copies that have a manifest."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return []
        names = [posixpath.basename(path.rstrip("/")) for path in self._files.ls(self._root, detail=False)]
        return [n for n in names if STEP_FOLDER.fullmatch(n) and self._files.exists(self._path(n, MANIFEST))]

    def _copy(self, checkpoint: Path) -> None:
        files = (path for path in checkpoint.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: (path.name == MANIFEST, path)):
            there = self._path(checkpoint.name, path.relative_to(checkpoint).as_posix())
            self._files.makedirs(posixpath.dirname(there), exist_ok=True)
            self._files.put_file(str(path), there)

    def _path(self, *names: str) -> Any:
        return posixpath.join(self._root, *names)
