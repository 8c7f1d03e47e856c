"""Scripts of the benchmarks start; the one for a GPU runs all of its tasks on the CPU, and its checks can fail."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_every_script_finds_what_it_imports_and_shows_its_help(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "-h"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> tuple[int, Any]:
    arguments = ["--device", "cpu", "--tiny", "--rounds", "1", "--warmup", "0", "--out", str(out), *words]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    code = gpu.main()
    return code, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.long
def test_every_task_runs_at_a_tiny_size(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, report = run(gpu, monkeypatch, tmp_path / "gpu.json")
    assert (code, report["failed"], report["not_run"]) == (0, {}, {})
    found = report["tasks"]
    assert {name.split()[0] for name in found} == {"rates", "check", "training", "overhead", "generation"}
    for preset in gpu.PRESETS:
        one = found["training 64 sdpa compiled"][preset]
        assert one["text_tokens_per_second"] == pytest.approx(
            one["positions_per_second"] * (58 / 64 if "meta" in preset else 1)
        )
        assert one["share_of_the_measured_matrix_rate"] > 0
        assert one["model_flops_utilisation"] is None  # a CPU has no data sheet here
    ratios = {(one["above"], one["below"]) for one in found["overhead k=0.2 eager"]["ratios"]}
    assert ("meta_indices", "plain") in ratios
    assert found["generation batch 1"]["facts"]["meta_steps"]["meta_part_bytes"] > 0


def test_a_wrong_attention_fails_its_check_and_the_right_one_passes(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from metatokens.model.meta_attention import MetaAttention

    # each meta-token would see those after it
    monkeypatch.setattr(MetaAttention, "is_causal", False)
    code, report = run(gpu, monkeypatch, tmp_path / "gpu.json", "--only", "check sdpa bfloat16")
    assert (code, report["tasks"]) == (1, {})
    assert "beside float64" in report["failed"]["check sdpa bfloat16"]["error"]
    monkeypatch.undo()
    code, report = run(gpu, monkeypatch, tmp_path / "gpu.json", "--only", "check sdpa bfloat16")
    assert (code, report["failed"]) == (0, {})
    errors = report["tasks"]["check sdpa bfloat16"]["relative_errors"]
    assert 0 < max(errors.values()) < report["tasks"]["check sdpa bfloat16"]["allowed"]


def test_no_task_begins_when_the_time_is_over(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, report = run(gpu, monkeypatch, tmp_path / "gpu.json", "--minutes", "0")
    assert (code, report["tasks"]) == (0, {})
    assert "training 64 sdpa eager" in report["not_run"]


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A6000", None),
        ("Tesla T4", None),
    ],
)
def test_the_data_sheet_is_found_by_the_name_of_the_gpu(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float | None
) -> None:
    import argparse

    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: name)
    found = gpu.find_data_sheet(argparse.Namespace(device="cuda", gpu=None))
    assert found == (None if teraflops is None else teraflops * 1e12)
