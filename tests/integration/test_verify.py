"""`metatokens verify`: one flipped bit in any file of any folder that this package wrote is found and named."""

import json
import os
import shutil
from pathlib import Path

import pytest
from training_runs import small_config

from commands import metatokens
from metatokens.analysis.results import write_results
from metatokens.report.sweep_results import SweepResults, to_json
from metatokens.storage import write_sealed
from metatokens.training.pretraining import pretrain
from metatokens.verification import verify_folder
from synthetic_results import build_results

UNPROTECTED = {"metrics.jsonl", "events.jsonl", "versions.json", "lock", "README.md"}
"""The log, what tells people of versions and processes, and text that its owner may edit: no figure comes from them."""


@pytest.fixture(scope="module")
def everything(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tokens, a run, an analysis, and a sweep with a run of its own."""
    folder = tmp_path_factory.mktemp("everything")
    shutil.copytree(tokens, folder / "tokens")
    short = ("--training.duration.steps", "4", "--schedule.warmup_steps", "0", "--checkpoint.interval_steps", "2")
    config = small_config(folder.parent / "preset.yaml", tokens, *short, "--model.num_hidden_layers", "1")
    pretrain(config, folder / "run", show_progress=False)
    write_results(folder / "analysis", *build_results())
    shutil.copytree(folder / "run", folder / "sweep" / "runs" / "arm")
    write_sealed(folder / "sweep" / "runs" / "arm" / "cpu_seconds.json", json.dumps({"cpu_seconds": 1.5}))
    write_sealed(folder / "sweep" / "results.json", to_json(SweepResults("sweep/1", {}, None, 1, 1, (), {}, ())))
    return folder


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("tokens", "tokens"),
        ("run", "run"),
        ("run/model", "model"),
        ("run/checkpoints/step-00000004", "checkpoint"),
        ("analysis", "analysis"),
        ("sweep", "sweep"),
        ("", "folders"),
    ],
)
def test_each_kind_of_folder_is_known_and_verified(everything: Path, place: str, kind: str) -> None:
    result = json.loads(metatokens("verify", everything / place, "--json").stdout)
    assert (result["kind"], result["problems"], result["not_sealed"]) == (kind, [], [])
    files = [path for path in (everything / place).rglob("*") if path.is_file() and path.name not in UNPROTECTED]
    # the digest of a manifest is in itself
    assert result["files_verified"] == len([path for path in files if path.name != "manifest.json"])


def test_a_flipped_bit_in_any_file_is_found_and_its_folder_named(everything: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(everything, tmp_path / "copy")
    sealed = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.name not in UNPROTECTED]
    # of a model's code, which a manifest covers file by file, one file of each folder; the run in the sweep is a copy
    code = {path.parent: path for path in sealed if path.suffix == ".py"}
    files = [path for path in sealed if path.suffix != ".py" or path == code[path.parent]]
    files = [path for path in files if "arm" not in path.parts or not {"model", "checkpoints"} & {*path.parts}]
    assert len(files) > 30
    for path in files:
        place = path.relative_to(copy)
        whole = path.read_bytes()
        for position in (len(whole) // 3, len(whole) - 2):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            (problem,) = verify_folder(copy / place.parts[0]).problems
            assert problem.exit_code == (4 if "model" in place.parts or "checkpoints" in place.parts else 3), problem
            assert str(path.parent) in str(problem), problem
        for length in (0, 5):  # the second ends within the seal
            path.write_bytes(whole[:length])
            (problem,) = verify_folder(copy / place.parts[0]).problems
            assert str(path.parent) in str(problem), problem
        path.write_bytes(whole)
    assert verify_folder(copy).problems == ()


def test_every_problem_is_a_line_and_the_exit_code_is_that_of_the_first(everything: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(everything / "run", tmp_path / "run")
    (copy / "result.json").write_text((copy / "result.json").read_text().replace('"steps": 4', '"steps": 5'))
    (copy / "model" / "model.safetensors").unlink()
    (copy / "checkpoints" / "step-00000002" / "adapter_config.json").write_text("{}")
    done = metatokens("verify", copy, code=3)
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    for line, part in zip(
        lines, ("result.json: expected its text", "model.safetensors", "adapter_config"), strict=True
    ):
        assert part in line


def test_a_file_of_an_older_version_is_named_as_one_without_a_digest(everything: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(everything / "run", tmp_path / "run")
    document = json.loads((copy / "result.json").read_text())
    del document["sha256"]
    (copy / "result.json").write_text(json.dumps(document))
    assert "result.json: no digest to compare with" in metatokens("verify", copy).stderr


def test_a_model_of_a_run_without_its_manifest_is_a_problem_and_any_other_has_no_digest(
    everything: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(everything / "run", tmp_path / "run")
    (copy / "model" / "manifest.json").unlink()
    (problem,) = verify_folder(copy).problems
    assert "model/manifest.json: expected the manifest of a run's model, found none" in str(problem)
    assert verify_folder(copy / "model").not_sealed == (str(copy / "model"),)


def test_a_folder_that_cannot_be_read_is_a_problem_and_the_others_are_verified(
    everything: Path, tmp_path: Path
) -> None:
    shutil.copytree(everything / "analysis", tmp_path / "z" / "analysis")
    (tmp_path / "a").mkdir()
    here = os.open(tmp_path / "a", os.O_RDONLY)
    for _ in range(20):  # at last the path is too long for any call, whoever makes it
        os.mkdir("d" * 250, dir_fd=here)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    found = verify_folder(tmp_path)
    assert [problem.exit_code for problem in found.problems] == [3]
    assert "expected a readable folder, found File name too long" in str(found.problems[0])
    assert found.files == 2


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "none of their files" in metatokens("verify", tmp_path, code=2).stderr
