"""Which losses are spikes, and that a run which skips them never stops learning."""

import math
import random

import pytest

from metatokens.training.spikes import LEAST_RISE, SIGMAS, WINDOW, JudgedStep, spike_limit


def judge(losses: list[float], loss: float, *, skips: bool = True) -> tuple[JudgedStep, list[float]]:
    judged = JudgedStep(loss, 1.0, spike_limit(losses), skips)
    return judged, judged.remembered(losses)


def test_a_spike_is_a_loss_six_deviations_above_the_mean_of_the_last_128() -> None:
    draw = random.Random(0)
    losses = [draw.gauss(3.0, 0.1) for _ in range(300)]
    window = losses[-WINDOW:]
    mean = sum(window) / WINDOW
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in window) / WINDOW)
    assert spike_limit(window) == pytest.approx(mean + SIGMAS * deviation, rel=1e-12)
    assert not judge(window, mean + 5.9 * deviation)[0].is_spike
    assert judge(window, mean + 6.1 * deviation)[0].is_spike
    assert spike_limit(window[1:]) == math.inf  # too few to tell


def test_after_losses_that_are_all_equal_a_last_bit_is_no_spike() -> None:
    for loss in (0.1, 3.0, 0.0):
        assert not judge([loss] * WINDOW, math.nextafter(loss, 9.0) if loss else 0.0)[0].is_spike
        assert judge([loss] * WINDOW, loss + LEAST_RISE + 1e-9)[0].is_spike


def test_a_mistake_in_a_task_that_is_all_but_solved_is_no_spike() -> None:
    losses = [0.001 + 0.0001 * (i % 7) for i in range(WINDOW)]
    assert not judge(losses, 0.09)[0].is_spike
    assert judge(losses, 0.2)[0].is_spike


def test_ordinary_training_has_no_spike() -> None:
    draw, losses = random.Random(1), []
    for step in range(2_000):
        judged, losses = judge(losses, 2 + 8 * math.exp(-step / 100) + draw.gauss(0, 0.1))
        assert not judged.is_spike, step


def test_a_loss_that_stays_high_is_soon_learnt_from_again() -> None:
    losses = [1.0 + 0.001 * (i % 7) for i in range(WINDOW)]
    skipped = 0
    while True:
        judged, losses = judge(losses, 9.0)
        if not judged.is_skipped:
            break
        skipped += 1
    assert 1 <= skipped <= 4


@pytest.mark.parametrize("numbers", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_numbers_that_are_not_finite_are_skipped_always_and_never_remembered(numbers: tuple[float, float]) -> None:
    judged = JudgedStep(*numbers, limit=0.5, skips_spikes=False)
    assert judged.is_skipped
    assert not judged.is_spike
    assert judged.remembered([1.0, 2.0]) == [1.0, 2.0]
    assert judged.record().keys() == {"reason", "skipped", "loss", "grad_norm"}


def test_a_spike_is_learnt_from_unless_the_run_skips_it() -> None:
    for skips in (False, True):
        judged = JudgedStep(9.0, 1.0, limit=2.0, skips_spikes=skips)
        assert (judged.is_spike, judged.is_skipped, judged.is_finite) == (True, skips, True)
        assert judged.remembered([1.0]) == [1.0, 9.0]
    assert "changes nothing: its loss 9 is a spike" in str(judged)
