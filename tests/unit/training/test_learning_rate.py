"""The learning rate as a function of the step, and what decays."""

import pytest
import torch

from metatokens.config.schema import CosineSchedule, ModelConfig, OptimizerConfig, Schedule, WsdSchedule
from metatokens.training.initialization import build_model
from metatokens.training.optimizer import build_optimizer, learning_rate_at

PEAK, TOTAL = 0.5, 100


def rate(step: int, schedule: Schedule) -> float:
    return learning_rate_at(step, total_steps=TOTAL, peak=PEAK, schedule=schedule)


BOTH = [CosineSchedule(warmup_steps=10, floor=0.1), WsdSchedule(warmup_steps=10, decay_steps=20, floor=0.1)]


@pytest.mark.parametrize("schedule", BOTH)
def test_warm_up_starts_above_zero_and_rises_linearly_to_the_peak(schedule: Schedule):
    assert [rate(step, schedule) for step in (0, 4, 9)] == pytest.approx([PEAK / 10, PEAK / 2, PEAK])


@pytest.mark.parametrize("schedule", BOTH)
def test_the_step_after_the_warm_up_has_the_peak(schedule: Schedule):
    assert rate(10, schedule) == PEAK


@pytest.mark.parametrize("schedule", BOTH)
def test_without_warm_up_the_first_step_has_the_peak(schedule: Schedule):
    assert rate(0, schedule.model_copy(update={"warmup_steps": 0})) == PEAK


@pytest.mark.parametrize("schedule", BOTH)
def test_the_floor_is_reached_at_the_end_and_kept_beyond_it(schedule: Schedule):
    assert rate(TOTAL, schedule) == pytest.approx(PEAK * 0.1)
    assert rate(TOTAL + 50, schedule) == pytest.approx(PEAK * 0.1)


@pytest.mark.parametrize("schedule", BOTH)
def test_the_rate_never_rises_after_the_warm_up(schedule: Schedule):
    rates = [rate(step, schedule) for step in range(10, TOTAL + 1)]
    assert rates == sorted(rates, reverse=True)


def test_the_cosine_is_half_way_between_peak_and_floor_in_its_middle():
    assert rate(55, CosineSchedule(warmup_steps=10, floor=0.1)) == pytest.approx(PEAK * 0.55)


def test_a_horizon_beyond_the_end_leaves_the_cosine_unfinished():
    long = CosineSchedule(warmup_steps=10, horizon_steps=3 * TOTAL, floor=0.1)
    assert rate(TOTAL, long) == learning_rate_at(TOTAL, total_steps=3 * TOTAL, peak=PEAK, schedule=BOTH[0])
    assert rate(TOTAL, long) > 0.7 * PEAK


def test_a_horizon_before_the_end_stays_on_the_floor():
    assert rate(60, CosineSchedule(warmup_steps=10, horizon_steps=50, floor=0.1)) == pytest.approx(PEAK * 0.1)


def test_wsd_is_stable_until_its_decay_and_then_linear():
    schedule = WsdSchedule(warmup_steps=10, decay_steps=20, floor=0.0)
    assert rate(TOTAL - 20, schedule) == PEAK
    assert rate(TOTAL - 10, schedule) == pytest.approx(PEAK / 2)
    assert rate(TOTAL - 1, schedule) == pytest.approx(PEAK / 20)


def test_matrices_decay_and_vectors_do_not():
    model = build_model(
        ModelConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, position_encoding="learned"),
        text_vocab_size=30,
        eos_token_id=0,
        seed=0,
    )
    matrices, vectors = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all(names[p].endswith("bias") or "norm" in names[p] for p in vectors["params"])
    assert not any(names[p].endswith("bias") or "norm" in names[p] for p in matrices["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(names)


def test_the_optimizer_takes_its_numbers_from_the_config():
    config = OptimizerConfig(learning_rate=0.25, betas=(0.5, 0.75), eps=1e-3)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-3)
