"""A checkpoint is complete and verified, or it is not there."""

import contextlib
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from metatokens.config.schema import CheckpointConfig
from metatokens.errors import CheckpointError, NumericError, ResourceError
from metatokens.storage import new_folder, remove_leftovers
from metatokens.training.checkpoint import (
    TrainingState,
    find_checkpoint,
    load_checkpoint,
    read_state,
    verify_checkpoint,
)
from metatokens.training.distributed import Processes
from metatokens.training.saving import Saver, save_checkpoint

if TYPE_CHECKING:
    from conftest import Training
else:
    Training = Any

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json", "manifest.json"]


@pytest.fixture(scope="module")
def saved_once(make_training: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = make_training()
    training.take_step(0)
    return training.save(tmp_path_factory.mktemp("checkpoints"), 1)


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_once, tmp_path / saved_once.name)


def damaged(function: Callable[[], object], *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        function()
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def sign_again(path: Path) -> None:
    """Make the manifest agree with the files, as someone would who has changed them on purpose."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
        if file.is_file() and file.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps({"format": "checkpoint/1", "files": files}))


def test_what_is_loaded_equals_what_was_saved_to_the_bit(training: Training, make_training: Any, tmp_path: Path):
    training.take_step(1)
    path = training.save(tmp_path, 7)
    verify_checkpoint(path)
    other = make_training()
    load_checkpoint(path, other.model, other.optimizer)
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    for own, its in zip(training.model.parameters(), other.model.parameters(), strict=True):
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(training.optimizer.state[own][kind], other.optimizer.state[its][kind])
    assert (read_state(path).step, read_state(path).content_id) == (7, "the content")


def test_the_step_after_loading_equals_the_step_without(training: Training, make_training: Any, tmp_path: Path):
    other = make_training()
    load_checkpoint(training.save(tmp_path, 1), other.model, other.optimizer)
    training.take_step(2)
    other.take_step(2)
    for own, its in zip(training.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(own, its)


def test_a_model_that_no_step_has_changed_yet_can_be_saved_and_loaded(make_training: Any, tmp_path: Path):
    path = make_training().save(tmp_path, 1)
    other = make_training()
    load_checkpoint(path, other.model, other.optimizer)
    assert not any(other.optimizer.state[parameter] for parameter in other.model.parameters())


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing_is_named(saved: Path, file: str):
    (saved / file).unlink()
    damaged(lambda: verify_checkpoint(saved), file)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_truncated_is_named(saved: Path, file: str):
    os.truncate(saved / file, (saved / file).stat().st_size // 2)
    damaged(lambda: verify_checkpoint(saved), file)


@pytest.mark.parametrize("file", FILES)
def test_a_file_with_one_bit_flipped_is_named(saved: Path, file: str):
    flip_a_bit(saved / file)
    damaged(lambda: verify_checkpoint(saved), file)


def test_no_flipped_bit_of_the_manifest_goes_through_unless_the_files_are_the_same(saved: Path):
    manifest = saved / "manifest.json"
    content = manifest.read_bytes()
    files = json.loads(content)["files"]
    for position in range(0, len(content), 97):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        manifest.write_bytes(changed)
        try:
            verify_checkpoint(saved)
        except CheckpointError:
            continue
        assert json.loads(changed)["files"] == files


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        '{"files": {}}',
        '{"format": "checkpoint/2", "files": {}}',
        '{"format": "checkpoint/1", "files": {}}',
        '{"format": "checkpoint/1", "files": {"../state.json": {"bytes": 1, "sha256": "0"}}}',
        '{"format": "checkpoint/1", "files": {"state.json": 3}}',
        "[" * 100_000,
        " " * (2**20 + 1),
    ],
)
def test_a_manifest_that_is_none_is_refused(saved: Path, manifest: str):
    (saved / "manifest.json").write_text(manifest)
    damaged(lambda: verify_checkpoint(saved), "manifest.json")


def test_the_newest_checkpoint_is_found(training: Training, tmp_path: Path):
    for step in (9, 10, 100):
        training.save(tmp_path, step, keep=3)
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000100"


def test_no_checkpoint_is_found_where_there_is_none(tmp_path: Path):
    (tmp_path / ".step-00000001.tmp-1").mkdir()
    assert find_checkpoint(tmp_path) is None


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(training: Training, tmp_path: Path):
    older, newest = training.save(tmp_path, 1), training.save(tmp_path, 2)
    flip_a_bit(newest / "optimizer.safetensors")
    with pytest.warns(UserWarning, match="step-00000002/optimizer.safetensors"):
        assert find_checkpoint(tmp_path) == older


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_a_newest_checkpoint_that_the_disk_cannot_read_is_passed_over_with_a_warning(
    training: Training, tmp_path: Path, file: str
):
    older, newest = training.save(tmp_path, 1), training.save(tmp_path, 2)
    (newest / file).unlink()
    (newest / file).symlink_to("/proc/self/mem")  # reading its first byte is an EIO
    if file == "state.json":  # the link has the size of what it leads to
        digests = {name: {"bytes": 0, "sha256": "0" * 64} for name in ("config.json", "state.json")}
        (newest / "config.json").unlink()
        (newest / "config.json").symlink_to("/proc/self/mem")
        (newest / "manifest.json").write_text(json.dumps({"format": "checkpoint/1", "files": digests}))
        for tensors in newest.glob("*.safetensors"):
            tensors.unlink()
    with pytest.warns(UserWarning, match="found Input/output error"):
        assert find_checkpoint(tmp_path) == older


def test_if_every_checkpoint_is_damaged_the_run_does_not_start_again_from_scratch(training: Training, tmp_path: Path):
    for step in (1, 2):
        flip_a_bit(training.save(tmp_path, step) / "model.safetensors")
    with pytest.warns(UserWarning, match="passed over"):
        damaged(lambda: find_checkpoint(tmp_path), "step-00000002/model.safetensors")


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(training: Training, tmp_path: Path):
    training.save(tmp_path, 1)
    flip_a_bit(training.save(tmp_path, 2) / "model.safetensors")
    verify_checkpoint(training.save(tmp_path, 2))


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_the_new_one(training: Training, tmp_path: Path):
    flip_a_bit(training.save(tmp_path, 9) / "model.safetensors")
    path = training.save(tmp_path, 5, keep=1)
    with pytest.warns(UserWarning, match="step-00000009"):
        assert find_checkpoint(tmp_path) == path


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_rotation_keeps_the_newest(training: Training, tmp_path: Path, keep: int):
    for step in (1, 2, 3, 4):
        training.save(tmp_path, step, keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{i}" for i in range(5 - keep, 5)]


def test_leftovers_of_a_killed_save_are_removed_and_checkpoints_stay(training: Training, tmp_path: Path):
    path = training.save(tmp_path, 1)
    shutil.copytree(path, tmp_path / ".step-00000002.tmp-4321")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_width_names_a_tensor_and_both_shapes(
    training: Training, make_training: Any, tmp_path: Path
):
    path = training.save(tmp_path, 1)
    other = make_training(hidden_size=8)
    damaged(lambda: load_checkpoint(path, other.model, other.optimizer), "embed_tokens.weight", "(320, 16)", "(320, 8)")


def test_a_checkpoint_of_another_depth_names_a_tensor_that_it_lacks(
    training: Training, make_training: Any, tmp_path: Path
):
    path = training.save(tmp_path, 1)
    other = make_training(num_hidden_layers=3)
    damaged(lambda: load_checkpoint(path, other.model, other.optimizer), "layers.2.", "in the model only")


def test_a_refused_checkpoint_leaves_the_model_as_it_was(training: Training, make_training: Any, tmp_path: Path):
    path = training.save(tmp_path, 1)
    moments = load_file(path / "optimizer.safetensors")
    moments.pop("exp_avg_sq/model.norm.weight")
    save_file(moments, path / "optimizer.safetensors")
    other = make_training()
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    damaged(lambda: load_checkpoint(path, other.model, other.optimizer), "exp_avg_sq/model.norm.weight")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items())


def test_tensors_of_another_type_are_not_cast_in_silence(training: Training, make_training: Any, tmp_path: Path):
    path = training.save(tmp_path, 1)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, path / "model.safetensors")
    other = make_training()
    damaged(lambda: load_checkpoint(path, other.model, other.optimizer), "model.norm.weight", "torch.float16")


@pytest.mark.parametrize("state", ["", "[1]", "{}", '{"step": 1, "content_id": "", "world_size": 1, "more": 0}'])
def test_a_state_that_is_none_is_refused(saved: Path, state: str):
    (saved / "state.json").write_text(state)
    damaged(lambda: read_state(saved), "state.json")


def test_weights_that_are_not_finite_never_become_a_checkpoint(training: Training, tmp_path: Path):
    path = training.save(tmp_path, 1)
    with torch.no_grad():
        training.model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericError, match="finite weights"):
        training.save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [path]


class Payload:
    """Pickles to a call that leaves a marker behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_pickles_beside_or_inside_a_checkpoint_are_never_executed(
    training: Training, make_training: Any, tmp_path: Path
):
    marker = tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    (tmp_path / "checkpoints").mkdir()
    path = training.save(tmp_path / "checkpoints", 1)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (path / name).write_bytes(payload)
    sign_again(path)
    other = make_training()
    assert find_checkpoint(tmp_path / "checkpoints") == path
    load_checkpoint(path, other.model, other.optimizer)
    for name in ("optimizer.safetensors", "model.safetensors"):
        (path / name).write_bytes(payload)
        sign_again(path)
        verify_checkpoint(path)
        damaged(lambda: load_checkpoint(path, other.model, other.optimizer), name)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()  # the payload works where it is executed


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_file_that_cannot_grow_leaves_nothing_and_the_previous_checkpoint(
    training: Training, tmp_path: Path, file: str
):
    path = training.save(tmp_path, 1)
    with files_limited_to((path / file).stat().st_size - 1), pytest.raises(ResourceError) as caught:
        training.save(tmp_path, 2)
    assert caught.value.exit_code == 6
    assert "step-00000002" in str(caught.value)
    assert "bytes free" in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    verify_checkpoint(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many bytes, which only root may."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(num_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_a_full_disk_leaves_nothing_and_the_previous_checkpoint(
    training: Training, tmp_path: Path, small_disk: Callable[[int], Path], share: float
):
    page = 4096
    pages = sum(-(-file.stat().st_size // page) for file in training.save(tmp_path, 1).rglob("*"))
    disk = small_disk(int((1 + share) * pages) * page)
    path = training.save(disk, 1)
    with pytest.raises(ResourceError) as caught:
        training.save(disk, 2)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert list(disk.iterdir()) == [path]
    verify_checkpoint(path)


def test_a_folder_in_the_making_is_removed_by_any_error(tmp_path: Path):
    def write_half() -> None:
        with new_folder(tmp_path / "model") as path:
            (path / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_save_into_a_folder_that_is_gone_is_one_line(training: Training, tmp_path: Path):
    with pytest.raises(ResourceError, match="step-00000001"):
        save_checkpoint(
            tmp_path / "run" / "gone",
            training.model,
            training.optimizer,
            read_state(training.save(tmp_path, 1)),
            tokenizer=None,
            keep=1,
        )


def saver(folder: Path, training: Training, **settings: Any) -> Saver:
    config = CheckpointConfig(**settings)
    return Saver(folder, config, Processes(), is_sharded=False, tokenizer=training.tokenizer)


def test_a_save_in_the_background_keeps_the_state_of_its_step(training: Training, tmp_path: Path):
    (tmp_path / "before").mkdir()
    before = training.save(tmp_path / "before", 1)
    beside = saver(tmp_path, training, background=True)
    beside.save(training.model, training.optimizer, read_state(before))
    training.take_step(1)
    beside.finish()
    path = tmp_path / before.name
    verify_checkpoint(path)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (path / name).read_bytes() == (before / name).read_bytes()


def test_a_save_in_the_background_that_fails_says_so_at_the_end_and_leaves_the_previous_one(
    training: Training, tmp_path: Path, small_disk: Callable[[int], Path]
):
    size = sum(file.stat().st_size for file in training.save(tmp_path, 1).iterdir())
    disk = small_disk(int(1.5 * size))
    beside = saver(disk, training, background=True)
    for step in (1, 2):
        beside.save(training.model, training.optimizer, TrainingState(step, "the content", 1))
    with pytest.raises(ResourceError, match="step-00000002"):
        beside.finish()
    assert not beside.has_failed
    assert list(disk.iterdir()) == [disk / "step-00000001"]
    verify_checkpoint(disk / "step-00000001")


def test_checkpoints_at_an_interval_are_kept_for_ever_besides_the_newest(training: Training, tmp_path: Path):
    rolling = saver(tmp_path, training, keep=1, keep_interval_steps=10)
    for step in (5, 10, 15, 20, 25):
        rolling.save(training.model, training.optimizer, TrainingState(step, "the content", 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{step}" for step in (10, 20, 25)]


def test_tensors_that_are_not_in_the_manifest_are_refused(saved: Path):
    save_file({"lora.weight": torch.ones(2)}, saved / "adapter_model.safetensors")
    damaged(lambda: verify_checkpoint(saved), "adapter_model.safetensors", "move it away")


def test_processes_that_divide_a_checkpoint_hash_each_file_once(saved: Path):
    flip_a_bit(saved / "state.json")
    refused = 0
    for index in range(3):
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(saved, share=(index, 3))
            continue
        refused += 1
    assert refused == 1
