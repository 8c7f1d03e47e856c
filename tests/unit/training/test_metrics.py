"""metrics.jsonl: readable, exact, and never the reason why a run ends."""

import json
import math
import resource
import threading
from pathlib import Path

import pytest

from metatokens.errors import UsageError
from metatokens.training.metrics import MetricsWriter, ProgressDisplay

# the thread of a tensorboard without room for its file dies of it, at some time
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_losses_are_written_readable_and_exactly(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", ())
    writer.write(3, loss=math.pi, grad_norm=0.5)
    writer.write(3, validation_loss=math.e)
    writer.close()
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first == {"step": 3, "loss": math.pi, "grad_norm": 0.5, "loss_hex": math.pi.hex()}
    assert float.fromhex(str(second["validation_loss_hex"])) == math.e


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", ())
    writer.write(1, loss=1.0)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    writer.close()


def test_a_second_writer_appends(tmp_path: Path):
    for step in (1, 2):
        writer = MetricsWriter(tmp_path / "metrics.jsonl", ())
        writer.write(step, loss=1.0)
        writer.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stays_valid_json(tmp_path: Path, value: float):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", ())
    writer.write(1, loss=value)
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "loss_hex": value.hex()}


def test_a_full_disk_warns_once_and_the_run_goes_on():
    writer = MetricsWriter(Path("/dev/full"), ())
    with pytest.warns(UserWarning, match="metrics are not written: No space left on device"):
        writer.write(0, loss=1.0)
    writer.write(1, loss=1.0)  # a second warning would be an error here
    writer.close()


def test_a_line_that_fits_only_in_part_is_taken_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, ())
    writer.write(1, loss=1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.warns(UserWarning, match="not written"):
            writer.write(2, loss=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(3, loss=3.0)
    writer.close()
    assert [line["step"] for line in lines(path)] == [1, 3]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path / "metrics.jsonl", ("tensorboard",))
    writer.write(5, loss=0.25)
    writer.close()
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(5, 0.25)]


def test_a_tracker_that_is_not_installed_is_one_line_with_the_remedy(tmp_path: Path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"logging.trackers: .*wandb.*pip install 'metatokens\[trackers\]'"):
            MetricsWriter(tmp_path / "metrics.jsonl", ("wandb",))
    else:
        pytest.skip("wandb is installed, and would start a run")


def test_progress_goes_to_standard_error_and_only_where_it_is_shown(capsys: pytest.CaptureFixture[str]):
    for label, shown in (("seen", True), ("hidden", False)):
        with ProgressDisplay(label, start=0, total=2, shown=shown) as display:
            display.update(1, "loss 3.0")
            display.update(2, "loss [bold]2.0")
            display.say(f"{label} ends")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["seen step 2/2 loss [bold]2.0", "seen ends"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_a_tracker_and_a_warning_and_not_the_run(tmp_path: Path):
    pytest.importorskip("tensorboard")
    writer = MetricsWriter(tmp_path / "metrics.jsonl", ("tensorboard",))
    writer.write(0, loss=1.0)
    (events,) = (tmp_path / "tensorboard").iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 10, hard))
    try:
        with pytest.warns(
            UserWarning, match=r"tensorboard failed \(OSError: .*\); it gets no more numbers, metrics.jsonl still does"
        ):
            writer.write(1, loss=1.0)
        writer.write(2, loss=1.0)  # a second warning would be an error here
        for thread in threading.enumerate():
            if type(thread).__name__ == "_AsyncWriterThread":
                thread.join(60)  # tensorboard's own ends with the error too, which must not be found in another test
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_tracker_that_cannot_make_its_folder_is_one_line_at_the_start(tmp_path: Path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(UsageError, match=r"logging\.trackers: expected tensorboard to start, found FileExistsError"):
        MetricsWriter(tmp_path / "metrics.jsonl", ("tensorboard",))


def test_a_resumed_run_is_the_same_one_to_wandb_and_has_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs = []
    for step in (1, 2):
        writer = MetricsWriter(tmp_path / "metrics.jsonl", ("wandb",), {"seed": 3})
        runs.append((wandb.run.id, dict(wandb.run.config)))
        writer.write(step, loss=1.0)
        writer.close()
    assert runs[0] == runs[1]
    assert runs[0][1] == {"seed": 3}
