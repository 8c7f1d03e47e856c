"""Saving: it commits the state of a training as a checkpoint, in the step or beside the next ones.

In the step the tensors are collected, and copied if the writing goes on in the background. Then every process writes
and hashes its files in a temporary folder, and the main process ends with the manifest and the rename. So a checkpoint
is complete or absent whenever a process dies. Processes that hold whole tensors leave the writing to the main one.
"""

import contextlib
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from metatokens.config.schema import CheckpointConfig
from metatokens.errors import NumericError, ResourceError
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import save_configs, save_model
from metatokens.storage import flush_path, new_folder
from metatokens.training.checkpoint import (
    MOMENTS,
    STATE,
    FileEntries,
    TrainingState,
    describe_files,
    describe_newest,
    moments_of,
    own_weights,
    step_folders,
    write_manifest,
)
from metatokens.training.distributed import Processes
from metatokens.training.parallel import local_part
from metatokens.training.remote import RemoteCopies

_SECONDS_TO_ABANDON = 30.0
_WEIGHTS_FILE, _MOMENTS_FILE = 1, 2  # numbers of a process's files


class Saver:
    """Saves one checkpoint after another; every process of a run has one and calls it at the same steps."""

    def __init__(
        self, folder: Path, config: CheckpointConfig, processes: Processes, *, is_sharded: bool, tokenizer: Any
    ) -> None:
        """Take where to save, and who takes part; nothing is written yet."""
        self._folder, self._config, self._processes = folder, config, processes
        self._is_sharded, self._tokenizer = is_sharded, tokenizer
        self._beside = replace(processes, group=processes.background_group)
        self._copies = None if config.copy_to is None else RemoteCopies(config.copy_to)
        self._stager: DefaultStager | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed, so that `finish` raises its error."""
        return self._error is not None

    def save(self, model: MetaTokenForCausalLM, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Commit a checkpoint, then remove the old ones that are not kept.

        In the background only the copy is made here, after the last save has ended.

        Raises:
            NumericError: if a weight is not finite, because such a checkpoint would replace a good one.
            ResourceError: if this or the last one cannot be written, as on a full disk; no part of it stays.
        """
        self.finish()
        with self._processes.raise_together():
            _check_finite(model, self._path(state))
        weights, moments = self._collect(model, optimizer)
        write = self._write_shards if self._is_sharded else self._write_whole
        if not self._config.background:
            self._commit(state, lambda path: write(path, model, weights, moments))
            return
        if self._stager is None:
            options = StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
            self._stager = DefaultStager(options)
        weights, moments = self._stager.stage({"weights": weights, "moments": moments}).values()  # type: ignore[union-attr]
        self._thread = threading.Thread(
            target=self._commit_beside, args=(state, lambda path: write(path, model, weights, moments)), name="saving"
        )
        self._thread.daemon = True
        self._thread.start()

    def save_diagnostic(
        self, model: MetaTokenForCausalLM, optimizer: torch.optim.Optimizer, state: TrainingState, path: Path
    ) -> None:
        """Write a state whose numbers have gone wrong to `path`, in the form of a checkpoint, to find out why.

        If it cannot be written, it is lost with a warning: the run ends for another reason.
        """
        weights, moments = self._collect(model, optimizer)
        write = self._write_shards if self._is_sharded else self._write_whole
        try:
            self.finish()
            self._commit(state, lambda folder: write(folder, model, weights, moments), path)
        except ResourceError as error:
            if self._processes.is_main:
                warnings.warn(f"the state is not kept for a diagnosis: {error}", stacklevel=3)

    def finish(self) -> None:
        """Wait until the save in the background has ended.

        Raises:
            ResourceError: if it failed, on every process.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:  # `_commit` raised together: every process has the error, unless one is gone
            raise error

    def abandon(self) -> None:
        """Give the save in the background some time to end, when the run ends by an error."""
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_ABANDON)

    def _path(self, state: TrainingState) -> Path:
        return self._folder / f"step-{state.step:08d}"

    def _collect(
        self, model: MetaTokenForCausalLM, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return weights and moments by name, in their own memory; nothing where another process writes them."""
        if not (self._is_sharded or self._processes.is_main):
            return {}, {}
        return own_weights(model), moments_of(model, optimizer)

    def _commit_beside(self, state: TrainingState, write: Callable[[Path], None]) -> None:
        try:
            self._commit(state, write)
        except Exception as error:  # noqa: BLE001 - `finish` raises it in the main thread
            self._error = error

    def _commit(self, state: TrainingState, write: Callable[[Path], None], other: Path | None = None) -> None:
        final = other or self._path(state)
        with contextlib.ExitStack() as stack:
            temporary = final
            with self._together(final):
                if self._processes.is_main:
                    temporary = stack.enter_context(new_folder(final))
            temporary = self._beside.gather(temporary)[0]
            write(temporary)
            entries: FileEntries = {}
            with self._together(final):
                if self._processes.is_main:
                    (temporary / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
                if self._is_sharded or self._processes.is_main:
                    entries = self._describe_own(temporary)
            parts = self._beside.gather(entries)
            with self._together(final):
                if self._processes.is_main:
                    entries = {name: entry for part in parts for name, entry in part.items()}
                    self._check_visible(temporary, entries)
                    write_manifest(temporary, entries)
                    if final.exists():
                        # it was damaged: the run passed over it, went on from an older one and is here again
                        shutil.rmtree(final)
                    stack.close()
                    if other is not None:
                        return
                    self._rotate(final, state)
                    if self._copies is not None:
                        self._copies.update(self._folder, self._config.keep_interval_steps)

    @contextlib.contextmanager
    def _together(self, path: Path) -> Iterator[None]:
        """Do a part of the work on `path` on every process; a failure of any is an error of one line on all."""
        with self._beside.raise_together(), _one_line_errors(path):
            yield

    def _write_whole(
        self, path: Path, model: MetaTokenForCausalLM, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        with self._together(path):
            if self._processes.is_main:
                save_model(model, path, self._tokenizer, weights=weights)
                save_file(moments, path / MOMENTS)

    def _write_shards(
        self, path: Path, model: MetaTokenForCausalLM, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        with self._together(path):
            if self._processes.is_main:
                save_configs(model, path, self._tokenizer)
        writer = HuggingFaceStorageWriter(
            str(path),
            fqn_to_index_mapping=dict.fromkeys(weights, _WEIGHTS_FILE) | dict.fromkeys(moments, _MOMENTS_FILE),
            save_distributed=True,
        )
        with _one_line_errors(path):
            save_distributed({**weights, **moments}, storage_writer=writer, process_group=self._beside.group)

    def _describe_own(self, folder: Path) -> FileEntries:
        """Flush and hash the files that this process wrote: those with its number, and on the main one the others."""
        own = f"shard-{self._processes.rank + 1:05d}-"
        paths = [path for path in folder.iterdir() if path.name.startswith(own)]
        if self._processes.is_main:
            paths += [path for path in folder.rglob("*") if not path.name.startswith("shard-")]
        for path in paths:
            flush_path(path)
        return describe_files(folder, paths)

    def _check_visible(self, folder: Path, entries: FileEntries) -> None:
        """Refuse a checkpoint if a process wrote its part to another disk."""
        for name, entry in entries.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
                raise ResourceError(
                    str(folder / name),
                    expected=f"{entry['bytes']} bytes that another process wrote",
                    found="no such file here",
                    remedy="put --out on a disk that all processes see",
                )

    def _rotate(self, newest: Path, state: TrainingState) -> None:
        # do not count a damaged checkpoint of a later step, or the new one would be removed as old
        folders = [path for path in step_folders(self._folder) if path.name <= newest.name]
        interval = self._config.keep_interval_steps
        # the weights that have just begun to give no finite loss may be in every newer checkpoint
        last_good_step = state.step - state.consecutive_skips - 1
        proven = next((path for path in folders if _step_of(path) <= last_good_step), None)
        for old in folders[self._config.keep :]:
            is_kept = interval is not None and _step_of(old) % interval == 0
            if not (is_kept or (state.consecutive_skips and old == proven)):
                shutil.rmtree(old)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def save_checkpoint(
    folder: Path,
    model: MetaTokenForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    *,
    tokenizer: Any,
    keep: int,
) -> Path:
    """Commit one checkpoint of a single process under `folder`, then remove all but the `keep` newest; see `Saver`.

    Returns:
        Its path.
    """
    saver = Saver(folder, CheckpointConfig(keep=keep), Processes(), is_sharded=False, tokenizer=tokenizer)
    saver.save(model, optimizer, state)
    return folder / f"step-{state.step:08d}"


def _check_finite(model: MetaTokenForCausalLM, final: Path) -> None:
    finite = [local_part(parameter.detach()).isfinite().all() for parameter in model.parameters()]
    if not torch.stack(finite).all():
        raise NumericError(
            str(final),
            expected="finite weights",
            found="infinities or NaN",
            remedy=f"lower optimizer.learning_rate; {describe_newest(final.parent)}",
        )


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn the failure of a write into a ResourceError; DCP collects those of all processes in an error of its own."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ResourceError.no_room(path, RuntimeError(f"rank {rank}: {cause}")) from None
    except OSError as error:
        raise ResourceError.no_room(path, error) from None
    except Exception as error:
        # on a full disk safetensors and tokenizers raise errors of their own types
        if "(os error" not in str(error):
            raise
        raise ResourceError.no_room(path, error) from None
