"""Accuracy on recall tasks, by length of the prompt and by intervention (paper section 4.2).

An instance of the test split is a prompt with one or more questions and their answers. The model reads all of it at
once. An answer is right if each of its tokens is the most likely text token at its place. Greedy decoding would write
the same: as long as every token so far is right, both have read the same. If a task gives choices, the model's answer
is the most probable choice instead, scored over a cache of the prompt.

Guessing is right now and then, too: each task states how often (`metatokens.tasks.registry.chance_of`).

Token accuracy is the share of answer tokens that are right; sequence accuracy is the share of whole answers. One model
has Wilson's interval if each instance has one answer, else a bootstrap over instances. Several models of one arm have a
bootstrap over seeds and instances. If all or none of the answers are right, no draw would differ from another, so
Wilson's interval is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.config.tasks import Difficulty, Task, length_bin
from metatokens.errors import NumericError
from metatokens.evaluation.extrapolation import reads_beyond_its_window, texts_of, window_of
from metatokens.evaluation.interventions import Intervention, intervene
from metatokens.evaluation.statistics import Interval, accuracy_interval, bootstrap_ratio, wilson_interval
from metatokens.generation.decoding import sequence_limit
from metatokens.model.compatibility import CACHE_NAME
from metatokens.tasks.coupling import check_coupling
from metatokens.tasks.encoding import EncodedInstance, encode_instance, pad
from metatokens.tasks.registry import make_instance

if TYPE_CHECKING:
    from metatokens.config.finetuning import EvaluateConfig
    from metatokens.tasks.base import PieceEncoder

RESULT_FORMAT = "recall/1"
Progress = Callable[[str], None]
Outcomes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RecallRow:
    """Accuracy of one model, or of several of one arm, at one length."""

    task: str
    length: str
    """Name of the bin, or lo-hi, in text tokens of the prompt."""
    size: tuple[int, int]
    prompt_tokens: tuple[int, int]
    meta_places: str
    interventions: tuple[str, ...]
    instances: int
    models: int
    chance: float
    """Share of whole answers that guesses get right, as each task states it; mean over the instances."""
    token_accuracy: Interval | None
    """None if the model cannot read prompts of this length; tables then show n/a."""
    sequence_accuracy: Interval | None
    """None if `token_accuracy` is None."""
    token_outcomes: tuple[tuple[float, ...], ...] = field(repr=False)
    """For each model and each instance, the share of answer tokens that are right. The interval of an arm pools these
    over its seeds."""
    sequence_outcomes: tuple[tuple[float, ...], ...] = field(repr=False)
    """For each model and each instance, the share of answers that are right. A paired comparison with another arm needs
    these."""


@dataclass(frozen=True)
class RecallReport:
    """The result that `metatokens evaluate` writes."""

    format: str
    models: tuple[str, ...]
    parameters: int
    config: dict[str, Any]
    rows: tuple[RecallRow, ...]


@dataclass(frozen=True)
class AnswerCounts:
    """Right answers of each instance; arrays of shape (instances,)."""

    right_tokens: Outcomes
    tokens: Outcomes
    right_answers: Outcomes
    answers: Outcomes


def make_test_instances(
    task: Task,
    difficulty: Difficulty,
    *,
    encoder: PieceEncoder,
    meta_token_id: int,
    seed: int,
    instances: int,
) -> list[EncodedInstance]:
    """Return the first `instances` encoded instances of the test split."""
    return [
        encode_instance(
            make_instance(task, difficulty, encoder=encoder, seed=seed, split="test", index=index),
            task,
            encoder=encoder,
            meta_token_id=meta_token_id,
        )
        for index in range(instances)
    ]


@torch.no_grad()
def count_right_answers(model: Any, encoded: Sequence[EncodedInstance], *, batch_size: int) -> AnswerCounts:
    """Let a model answer, and count its right tokens and answers.

    Args:
        model: a causal language model in evaluation mode whose config has meta_token_id and pad_token_id.
        encoded: instances in the tokens of the model.
        batch_size: instances per forward pass.

    Raises:
        NumericError: logits are not finite.
    """
    counts = np.zeros((4, len(encoded)))
    # neighbours of about equal length share a batch
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        rows = [encoded[i] for i in members]
        choose = bool(rows[0].choices)
        with texts_of(model, max(row.num_positions for row in rows)):
            predicted = _predict(model, rows)
        for member, row, tokens in zip(members, rows, predicted, strict=True):
            answers = [tokens[a - 1 : b - 1] for a, b in row.answer_spans]
            if choose:
                with texts_of(model, row.num_positions + max(map(len, row.choices))):
                    answers = _choose(model, row)
            counts[:, member] = _count(row, answers)
    return AnswerCounts(*counts)


def _count(row: EncodedInstance, answers: Sequence[npt.NDArray[np.int64]]) -> tuple[int, int, int, int]:
    """Return right tokens, tokens, right answers and answers of one instance."""
    right_tokens = num_tokens = right_answers = 0
    for (start, stop), answer in zip(row.answer_spans, answers, strict=True):
        truth = row.input_ids[start:stop]
        same = sum(int(a == b) for a, b in zip(answer, truth, strict=False))
        right_tokens += same
        num_tokens += len(truth)
        right_answers += int(same == len(truth) == len(answer))
    return right_tokens, num_tokens, right_answers, len(row.answer_spans)


def _predict(model: Any, rows: Sequence[EncodedInstance]) -> list[npt.NDArray[np.int64]]:
    """Return the most likely text token after each position of each row, (T,) int64 for a row."""
    batch = pad(rows, meta_token_id=model.config.meta_token_id, pad_token_id=model.config.pad_token_id)
    inputs = batch.to_model_inputs(device=model.device)
    del inputs["shift_labels"]
    wanted = np.zeros(batch.input_ids.shape[1], dtype=np.bool_)
    for row in rows:
        for start, stop in row.answer_spans:
            wanted[start - 1 : stop - 1] = True
    # only the positions where some row has an answer: few of a long prompt's
    positions = torch.from_numpy(np.flatnonzero(wanted)).to(model.device)
    logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    _check_finite(logits)
    best = _without_special(model, logits).argmax(-1).cpu().numpy()
    predicted = np.full(batch.input_ids.shape, -1, dtype=np.int64)
    predicted[:, wanted] = best
    return list(predicted)


def _choose(model: Any, row: EncodedInstance) -> list[npt.NDArray[np.int64]]:
    """Return the most probable choice for each answer of one row."""
    answers = []
    for start, _ in row.answer_spans:
        prompt = torch.from_numpy(row.input_ids[None, :start]).to(model.device)
        placed, position = {}, None
        if row.groups is not None:
            places = torch.from_numpy(row.groups[None, :start]).to(model.device)
            placed, position = {"position_ids": places, "attention_mask": torch.ones_like(prompt)}, row.groups[start]
        outputs = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **placed)
        _check_finite(outputs.logits)
        first = outputs.logits[0, -1].float().log_softmax(-1)
        scores = torch.stack([first[choice[0]] for choice in row.choices])
        longest = max(len(choice) for choice in row.choices)
        if longest > 1:
            scores = scores + _score_rest(model, outputs[CACHE_NAME], row.choices, start, position)
        answers.append(np.array(row.choices[int(scores.argmax())], dtype=np.int64))
    return answers


def _score_rest(model: Any, cache: Any, choices: Sequence[tuple[int, ...]], start: int, position: int | None) -> Tensor:
    """Return (choices,) log-probabilities of what follows the first token of each choice, from the prompt's cache.

    All tokens of a choice stand at `position`, unless it is None.
    """
    longest = max(map(len, choices))
    rest = np.full((len(choices), longest), model.config.pad_token_id, dtype=np.int64)
    for index, choice in enumerate(choices):
        rest[index, : len(choice)] = choice
    tokens = torch.from_numpy(rest).to(model.device)
    cache.batch_repeat_interleave(len(choices))
    mask = torch.ones((len(choices), start + longest), dtype=torch.long, device=model.device)
    mask[:, start:] = (tokens != model.config.pad_token_id).long()
    placed = {} if position is None else {"position_ids": torch.full_like(tokens, int(position))}
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=True, **placed, **{CACHE_NAME: cache}).logits
    log_probabilities = logits[:, :-1].float().log_softmax(-1)
    picked = log_probabilities.gather(2, tokens[:, 1:, None])[..., 0]
    scores: Tensor = picked.masked_fill(tokens[:, 1:] == model.config.pad_token_id, 0).sum(-1)
    return scores


def _check_finite(logits: Tensor) -> None:
    """Refuse logits that are not finite: NaN cannot be compared, so the first id would pass for the answer."""
    if not logits.isfinite().all():
        raise NumericError(
            "logits of the answers",
            expected="finite ones",
            found="infinities or NaN",
            remedy="check the weights, or load the model in float32",
        )


def _without_special(model: Any, logits: Tensor) -> Tensor:
    """Leave out the ids after the text vocabulary, such as the meta-token."""
    return logits[..., : model.config.meta_token_id]


def evaluate_recall(
    models: Iterable[Any],
    config: EvaluateConfig,
    encoder: PieceEncoder,
    *,
    interventions: Sequence[Intervention] = (),
    progress: Progress | None = None,
) -> tuple[RecallRow, ...]:
    """Evaluate the models of one arm, one training seed each, at every length, on the same instances.

    Args:
        models: in evaluation mode, with one tokenizer; consumed one at a time.
        config: the task, its lengths and the number of instances.
        encoder: of the models' tokenizer.
        interventions: changes to the models at their meta-tokens.
        progress: called with a line of text after each length of each model.

    Raises:
        UsageError: the task cannot fill a length, or the model lacks the part that an intervention changes.
    """
    counts: dict[str, list[AnswerCounts | None]] = {length: [] for length in config.lengths}
    instances: dict[str, list[EncodedInstance]] = {}
    for number, model in enumerate(models, start=1):
        check_coupling(config.task, model.config)
        for length in config.lengths:
            if length not in instances:
                instances[length] = make_test_instances(
                    config.task,
                    Difficulty(size=config.size, prompt_tokens=length_bin(length)),
                    encoder=encoder,
                    meta_token_id=model.config.meta_token_id,
                    seed=config.seed,
                    instances=config.instances,
                )
            encoded, limit = instances[length], sequence_limit(model)
            longest = max(row.num_positions for row in encoded)
            if limit is not None and longest > limit and not (config.extrapolate and reads_beyond_its_window(model)):
                counts[length].append(None)
            else:
                token_counts = _token_counts(encoded, encoder.vocab_size)
                # choices may be longer than the answer
                with window_of(model, 2 * longest), intervene(model, tuple(interventions), token_counts=token_counts):
                    counts[length].append(count_right_answers(model, encoded, batch_size=config.batch_size))
            if progress:
                progress(f"{config.task.kind}, {length}, model {number}")
    return tuple(_row(config, length, counts[length], instances[length], interventions) for length in config.lengths)


def report(rows: Sequence[RecallRow], config: EvaluateConfig, models: Sequence[str], model: Any) -> RecallReport:
    """Return the report of an arm; `model` is one of its models, for the number of parameters."""
    return RecallReport(
        RESULT_FORMAT, tuple(models), model.num_parameters(), config.model_dump(mode="json"), tuple(rows)
    )


def _row(
    config: EvaluateConfig,
    length: str,
    counts: Sequence[AnswerCounts | None],
    encoded: Sequence[EncodedInstance],
    interventions: Sequence[Intervention],
) -> RecallRow:
    known = [count for count in counts if count is not None]
    whole = len(known) == len(counts)
    return RecallRow(
        task=config.task.kind,
        length=length,
        size=config.size,
        prompt_tokens=length_bin(length),
        meta_places=config.task.meta_places.kind,
        interventions=tuple(intervention.kind for intervention in interventions),
        instances=config.instances,
        models=len(counts),
        chance=float(np.mean([row.chance for row in encoded])),
        token_accuracy=_accuracy([(c.right_tokens, c.tokens) for c in known], config.seed) if whole else None,
        sequence_accuracy=_accuracy([(c.right_answers, c.answers) for c in known], config.seed) if whole else None,
        token_outcomes=tuple(tuple((c.right_tokens / c.tokens).tolist()) for c in known) if whole else (),
        sequence_outcomes=tuple(tuple((c.right_answers / c.answers).tolist()) for c in known) if whole else (),
    )


def _accuracy(counts: Sequence[tuple[Outcomes, Outcomes]], seed: int) -> Interval:
    """Return the share that is right with its interval; `counts` has (right, all), (instances,) each, per model."""
    (right, every), *others = counts
    if others or right.sum() in (0, every.sum()):
        return accuracy_interval([right / every for right, every in counts], seed=seed)
    if (every == 1).all():
        return wilson_interval(int(right.sum()), len(right))
    return bootstrap_ratio(right, every, seed=seed)


def _token_counts(encoded: Sequence[EncodedInstance], vocab_size: int) -> npt.NDArray[np.int64]:
    """Return how often each text token occurs in the instances, (V,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for row in encoded:
        counts += np.bincount(row.input_ids[row.input_ids < vocab_size], minlength=vocab_size)
    return counts
