"""AdamW with decay on matrices only, and learning rates as pure functions of the step."""

import math

import torch
from torch import nn

from metatokens.config.schema import CosineSchedule, OptimizerConfig, Schedule


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return fused AdamW; it decays matrices but not vectors (biases, norms), as in GPT-2 and nanoGPT."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def learning_rate_at(step: int, *, total_steps: int, peak: float, schedule: Schedule) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.floor
    if isinstance(schedule, CosineSchedule):
        horizon = schedule.horizon_steps or total_steps
        progress = min(1.0, (step - schedule.warmup_steps) / max(1, horizon - schedule.warmup_steps))
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    remaining = (total_steps - step) / schedule.decay_steps
    return peak * (floor + (1 - floor) * min(1.0, max(0.0, remaining)))
