"""Checkpoints are copied to an address, and come back from there complete or not at all."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from metatokens.config.schema import CheckpointConfig
from metatokens.errors import UsageError
from metatokens.training.checkpoint import TrainingState, find_checkpoint
from metatokens.training.distributed import Processes
from metatokens.training.remote import RemoteCopies
from metatokens.training.saving import Saver

if TYPE_CHECKING:
    from conftest import Training
else:
    Training = Any


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/copies"


def test_copies_follow_the_checkpoints_and_the_newest_comes_back(training: Training, tmp_path: Path, address: str):
    folder, fresh = tmp_path / "run", tmp_path / "fresh"
    folder.mkdir()
    config = CheckpointConfig(keep=2, copy_to=address)
    saver = Saver(folder, config, Processes(), is_sharded=False, tokenizer=training.tokenizer)
    for step in (1, 2, 3):
        saver.save(training.model, training.optimizer, TrainingState(step, "the content", 1))
    files, root = fsspec.core.url_to_fs(address)
    assert {path.rsplit("/", 1)[1] for path in files.ls(root, detail=False)} == {"step-00000002", "step-00000003"}
    fresh.mkdir()
    RemoteCopies(address).fetch_newest(fresh)
    newest = find_checkpoint(fresh)
    assert newest == fresh / "step-00000003"
    for path in (path for path in (folder / newest.name).rglob("*") if path.is_file()):
        assert (newest / path.relative_to(folder / newest.name)).read_bytes() == path.read_bytes()

    files.rm_file(f"{root}/step-00000003/manifest.json")  # as if its copying had been interrupted
    shutil.rmtree(newest)
    RemoteCopies(address).fetch_newest(fresh)
    assert find_checkpoint(fresh) == fresh / "step-00000002"


def test_a_copy_that_fails_is_a_warning_and_the_checkpoint_is_kept(training: Training, tmp_path: Path):
    (tmp_path / "in the way").write_text("")
    config = CheckpointConfig(copy_to=f"file://{tmp_path}/in the way/copies")
    saver = Saver(tmp_path, config, Processes(), is_sharded=False, tokenizer=training.tokenizer)
    with pytest.warns(UserWarning, match="checkpoints are not copied to file:"):
        saver.save(training.model, training.optimizer, TrainingState(1, "the content", 1))
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000001"


def test_an_address_of_no_file_system_is_refused():
    with pytest.raises(UsageError, match=r"checkpoint\.copy_to: expected an address that fsspec knows"):
        RemoteCopies("nowhere://run")


def save_step(training: Training, folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    saver = Saver(folder, CheckpointConfig(keep=9), Processes(), is_sharded=False, tokenizer=training.tokenizer)
    saver.save(training.model, training.optimizer, TrainingState(step, "the content", 1))


def test_copies_of_later_steps_and_those_kept_for_ever_stay(training: Training, tmp_path: Path):
    folder, other = tmp_path / "run", tmp_path / "other"
    copies = RemoteCopies(f"file://{tmp_path}/copies")
    for step in (2, 4, 9):
        save_step(training, folder, step)
    copies.update(folder)
    save_step(training, other, 6)
    copies.update(other, keep_interval=4)
    left = sorted(path.name for path in (tmp_path / "copies").iterdir())
    assert left == ["step-00000004", "step-00000006", "step-00000009"]


def test_a_folder_of_older_checkpoints_gets_the_newest_copy(training: Training, tmp_path: Path):
    folder, other = tmp_path / "run", tmp_path / "other"
    copies = RemoteCopies(f"file://{tmp_path}/copies")
    save_step(training, folder, 4)
    copies.update(folder)
    save_step(training, other, 2)
    copies.fetch_newest(other)
    assert find_checkpoint(other) == other / "step-00000004"
