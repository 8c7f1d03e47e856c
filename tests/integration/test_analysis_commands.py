"""`metatokens analyze` and `metatokens report` on models that the commands before them have trained."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metatokens.analysis.kept import KEPT_NAME
from metatokens.analysis.results import read_results, write_results
from metatokens.analysis.run import MEASURES, Identity, analyze
from metatokens.cli import main
from metatokens.report.analysis_figures import FIGURES
from metatokens.training.loading import ModelFolder, analysis_config_of

pytestmark = pytest.mark.slow

SHAPE = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 128}"
TASK_PRESET = f"""
extends: tiny/recall
start: {{kind: fresh, model: {SHAPE}}}
task: {{kind: list_recall, questions: 2, num_lists: [1, 200]}}
curriculum: [{{steps: 3, size: [2, 3], prompt_tokens: [1, 48]}}]
schedule: {{warmup_steps: 1}}
training: {{batch_blocks: 4, micro_batch_blocks: 4}}
"""
FITTED = ["last meta-token", "token before it", "untrained"]
SMALL = [
    *("--documents", "8", "--calibration_documents", "4", "--token_views", "1", "--states", json.dumps(FITTED)),
    *("--rate_distortion.betas", "[0.1, 1.0]", "--rate_distortion.max_steps", "40", "--rate_distortion.num_seeds", "2"),
    *("--rate_distortion.hidden_size", "32", "--probe.max_steps", "40", "--probe.num_seeds", "2"),
    *("--probe.code_shares", "[0.25, 1.0]"),
]
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew black coffee in silence"
WORDS = TEXT.split()


@pytest.fixture(scope="module", name="recall_run")
def fixture_recall_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    (folder / "preset.yaml").write_text(TASK_PRESET)
    assert main(["finetune", str(folder / "preset.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module", name="texts")
def fixture_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(14):
        words = [WORDS[(number + 3 * place + place // 7) % len(WORDS)] for place in range(400)]
        (folder / f"{number:02}.txt").write_text(" ".join(words))
    return folder


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_recall_run_is_analysed_on_its_task(
    recall_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["analyze", str(recall_run), *SMALL, "--subject.pairs", "8", "--subject.fitted_instances", "60"]
    printed = run_json(capsys, *arguments, "--out", str(tmp_path / "one"))
    results, arrays = read_results(tmp_path / "one")
    assert printed == results.model_dump(mode="json")
    parts = {MEASURES[record.measure].part for record in results.records}
    assert parts == {"attention", "causal", "decodability", "output", "rate_distortion", "probes"}
    assert len(results.find("sharpening", layer=1)) == 2
    assert {record.at["intervention"] for record in results.find("accuracy")} == {
        "none",
        "zero_embedding",
        "zero_position",
        "no_position_edges",
    }
    assert results.find("interaction")[0].num_documents > 0
    assert {record.at["state"] for record in results.find("usable_information", target="answer")} == set(FITTED)
    assert results.find("erasure_loss", layer=0, erased="answer")
    assert results.find("attribution", component="attention", layer=0)
    assert results.find("capacity", size=6)
    tested = {verdict.claim for verdict in results.verdicts if verdict.verdict != "not tested"}
    assert "The meta-tokens' embedding lowers the entropy of attention" in tested
    assert "theory_points" in arrays
    for record in results.find("sharpening"):
        if record.at:
            behind = arrays["sharpening"][:, record.at["layer"], record.at["head"]]
            assert behind.shape == (8,)
            assert np.nanmean(behind) == pytest.approx(record.value, abs=1e-5)
    view, pair_view = results.token_views
    assert view.title == "instance 0"
    assert pair_view.title.startswith("minimal pair ")
    effect = arrays[pair_view.arrays["patch_effect"]]
    assert effect.shape == (3, len(pair_view.tokens))
    assert effect[-1, -1] == pytest.approx(1, abs=1e-3)  # the last state is the output
    assert arrays[view.arrays["logit_attention"]].shape == (2, len(view.tokens))
    assert len(results.checkpoint["sha256"]) == 64
    before = {name: (tmp_path / "one" / name).read_bytes() for name in ("results.json", "arrays.npz")}
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    assert {name: (tmp_path / "one" / name).read_bytes() for name in before} == before
    assert {figure.part for figure in FIGURES if figure.draw(results, arrays)} == parts
    few = tuple(record for record in results.records if record.measure in {"sharpening", "rate", "distortion"})
    write_results(tmp_path / "few", results.model_copy(update={"records": few}), arrays)
    page = run_json(capsys, "report", str(tmp_path / "few"), "--out", str(tmp_path / "page"))["page"]
    assert {path.suffix for path in (tmp_path / "page" / "figures").iterdir()} == {".pdf", ".png", ".txt"}
    assert "/run: task list_recall</h1>" in Path(page).read_text()


@pytest.mark.long
def test_a_killed_analysis_goes_on_behind_its_last_measure_to_the_same_bytes(recall_run: Path, tmp_path: Path) -> None:
    few = ["--parts", '["attention", "causal"]', *SMALL, "--subject.pairs", "8"]
    command = ["analyze", str(recall_run), *few, "--out", "analysis"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    subprocess.run([sys.executable, "-m", "metatokens.cli", *command], cwd=whole, check=True, capture_output=True)
    assert sorted(path.name for path in (whole / "analysis").iterdir()) == ["arrays.npz", "results.json"]
    kept = killed / "analysis" / KEPT_NAME
    process = subprocess.Popen([sys.executable, "-m", "metatokens.cli", *command], cwd=killed)
    while process.poll() is None and len([*kept.glob("*.npz")]) < 12:
        time.sleep(0.01)
    process.kill()
    process.wait()
    found = sorted(kept.glob("*.npz"))
    assert len(found) >= 12
    assert not (killed / "analysis" / "results.json").exists()

    damaged, before = found[0], {path: path.stat().st_ino for path in found[1:]}
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    ran = measures_that_run(recall_run, few, kept)
    assert damaged.stem in ran
    assert not {path.stem for path in before} & set(ran)
    assert set(measures_that_run(recall_run, [*few, "--seed", "1"], kept)) > set(ran)
    subprocess.run([sys.executable, "-m", "metatokens.cli", *command], cwd=killed, check=True, capture_output=True)
    for name in ("results.json", "arrays.npz"):
        assert (killed / "analysis" / name).read_bytes() == (whole / "analysis" / name).read_bytes()
    assert not kept.exists()


def measures_that_run(run: Path, options: list[str], kept: Path) -> list[str]:
    """Return the names of the measures that an analysis runs beside what is kept, in a copy."""
    ran: list[str] = []
    folder = ModelFolder(run)
    config = analysis_config_of(folder, None, options)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(kept, copy, dirs_exist_ok=True)
        analyze(
            folder.open_model().float(),
            folder.tokenizer,
            config,
            identity=Identity("a run", folder.sha256, ""),
            progress=lambda name, _: ran.append(name),
            keep=Path(copy),
        )
    return ran


def test_a_model_is_analysed_on_text(
    recall_run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["analyze", str(recall_run), "--text", str(texts), *SMALL, "--subject.window", "64"]
    run_json(capsys, *arguments, "--out", str(tmp_path))
    results, _ = read_results(tmp_path)
    parts = {MEASURES[record.measure].part for record in results.records}
    assert parts == {"attention", "decodability", "output", "similarity", "eviction", "knockout"}
    assert len(results.find("eviction_cost", policy="meta")) == 4
    assert results.data["documents"] == 8
    assert results.not_run == (
        "causal: not for a text",
        "rate_distortion: not for a text",
        "probes: not for a text",
        "similarity at distances from 32, half a document",
        "worth of meta-columns: at budget 0.15 7 of 48 columns stay, 12 of them under every policy",
    )
    assert {record.at["state"] for record in results.find("decodability")} == {
        "meta-token",
        "token before it",
        "ordinary token",
    }
    assert results.find("attribution", component="meta-attention", layer=1)
    for record in results.find("meta_branch_gain"):
        assert record.value is not None
        assert abs(record.value) < 0.5  # an untrained model loses next to nothing with its meta-attention


def test_what_cannot_be_analysed_is_one_line(
    recall_run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["analyze", *arguments, "--out", str(tmp_path / "out")]) == 2
        found = capsys.readouterr().err.strip().splitlines()
        assert len(found) == 1
        return found[0]

    shutil.copytree(recall_run / "model", tmp_path / "alone")
    assert "expected the run folder of a recall task, or --text" in line(str(tmp_path / "alone"))
    assert "documents" in line(str(recall_run), "--documents", "5")
    text = (str(recall_run), "--text", str(texts), *SMALL)
    assert "expected at most 128, the model's, found 400" in line(*text, "--subject.window", "400")
    many = line(str(recall_run), "--text", str(texts), "--documents", "20", "--subject.window", "64")
    assert "expected 36 of at least 58 tokens each, found 14 of 14" in many
    assert "did you mean 'documents'" in line(str(recall_run), "--document", "8")
    places = line(str(recall_run), *SMALL, "--subject.task.meta_places.kind", "none")
    assert "expected places of meta-tokens, found none" in places
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_measured(
    recall_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = run_json(capsys, "analyze", str(recall_run), "--out", str(tmp_path / "no"), "--dry-run")
    assert plan["subject"]["task"]["kind"] == "list_recall"
    assert plan["subject"]["difficulty"]["prompt_tokens"] == [1, 48]
    assert not (tmp_path / "no").exists()
