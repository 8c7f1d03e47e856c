"""What does a training step cost, with and without meta-tokens, here and elsewhere?

Two parts: the decoder alone, forward and backward, and the whole step, from ids and labels to changed weights. All
contenders predict the same tokens, so a ratio of seconds is one per text token; per position it is what one more
position costs. Operations are those that the question needs: a model that makes logits for positions without a target,
or attends to what it masks, is not credited for it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from metatokens.bench.measuring import BenchResult, Contender, Pair, Work, measure, quiet, set_threads
from metatokens.bench.sequences import Sequences, make_sequences
from metatokens.bench.training_contenders import TRAINING, Candidate, Shape
from metatokens.bench.turns import timed
from metatokens.config.bench import TrainingBench
from metatokens.model.accounting import training_flops

REGISTRY = TRAINING
PAIRS = (
    *(Pair(name, "plain") for name in ("meta", "meta_indices", "pause", "plain_text")),
    *(Pair(name, "plain_text") for name in ("meta", "meta_indices")),
    *(Pair(name, "meta_indices") for name in ("dense", "dense_fused")),
    *(Pair("plain", name) for name in ("gpt2", "llama")),
    *(Pair("plain_rope", name) for name in ("llama", "x_rotary")),
    Pair("meta_indices", "x_memory"),
)
ADAMW_BYTES_PER_PARAMETER = 4 * 7
"""Weight, gradient and two moments are read, and all but the gradient are written."""


def run(settings: TrainingBench, say: Callable[[str], None] = quiet) -> BenchResult:
    """Measure; `say` is told of the progress."""
    names, not_run = TRAINING.choose(settings.contenders)
    set_threads(settings)
    shape = Shape(settings, settings.length)
    sequences = make_sequences(settings, shape.meta_token_id)
    contenders = {}
    for name in names:
        say(f"building {name}")
        contenders[name] = contend(build(name, shape, sequences), settings, sequences)
    return measure("training", settings, TRAINING, contenders, pairs=PAIRS, not_run=not_run, say=say)


def build(name: str, shape: Shape, sequences: Sequences) -> Candidate:
    """Build a contender's model on the device of the settings, in training mode."""
    candidate: Candidate = TRAINING[name](shape, sequences)
    model: Any = candidate.model
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(shape.settings.attention)
    model.to(shape.settings.device).train()
    return candidate


def training_step(name: str, settings: TrainingBench) -> Callable[[], None]:
    """Return a whole step of a contender, for those who look at it in another way: forward, backward, new weights."""
    shape = Shape(settings, settings.length)
    found = build(name, shape, make_sequences(settings, shape.meta_token_id))
    model: Any = found.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(**found.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def contend(candidate: Candidate, settings: TrainingBench, sequences: Sequences) -> Contender:
    """Return the turn of a candidate and what its parts have to do."""
    rows, positions = settings.rows, candidate.num_positions
    num_targets = sequences.num_targets

    def operations(num_logits: int) -> float:
        return rows * training_flops(
            candidate.config,
            num_positions=positions,
            num_meta=candidate.num_meta,
            num_logits=num_logits // rows,
        )

    parameters = sum(parameter.numel() for parameter in candidate.model.parameters())
    size = {"text_tokens": num_targets, "positions": rows * positions}
    work = {
        "decoder forward": Work(**size, operations=operations(0) / 3),
        "decoder": Work(**size, operations=operations(0)),
        "forward and backward": Work(**size, operations=operations(num_targets)),
        "step": Work(**size, operations=operations(num_targets), moved_bytes=ADAMW_BYTES_PER_PARAMETER * parameters),
    }
    turns = [_TURNS[part](candidate, settings) for part in settings.parts]
    return Contender(lambda: {part: value for turn in turns for part, value in turn().items()}, work)


def _decoder_turn(candidate: Candidate, settings: TrainingBench) -> Callable[[], Mapping[str, float]]:
    decoder: Any = torch.compile(candidate.decoder) if settings.compile else candidate.decoder
    hidden: list[torch.Tensor] = []
    gradient: list[torch.Tensor] = []

    def forward() -> None:
        with _autocast(settings):
            hidden.append(decoder(**candidate.decoder_inputs).last_hidden_state)

    def backward() -> None:
        hidden.pop().backward(gradient[0])

    def turn() -> Mapping[str, float]:
        first = timed(forward)
        gradient[:] = [torch.full_like(hidden[0], 1e-3)]
        second = timed(backward)
        candidate.model.zero_grad(set_to_none=True)
        return {"decoder forward": first, "decoder": first + second}

    return turn


def _whole_turn(candidate: Candidate, settings: TrainingBench) -> Callable[[], Mapping[str, float]]:
    model: Any = torch.compile(candidate.model) if settings.compile else candidate.model
    optimizer = torch.optim.AdamW(candidate.model.parameters(), lr=1e-4, fused=True)

    def forward_backward() -> None:
        with _autocast(settings):
            loss = model(**candidate.inputs).loss
        loss.backward()

    def change_weights() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def turn() -> Mapping[str, float]:
        first, second = timed(forward_backward), timed(change_weights)
        return {"forward and backward": first, "step": first + second}

    return turn


_TURNS = {"decoder": _decoder_turn, "whole": _whole_turn}


def _autocast(settings: TrainingBench) -> torch.autocast:
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bfloat16")
