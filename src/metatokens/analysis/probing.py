"""What probes find in the states around a recall task's last meta-token, and whether the model uses it (E5 to E7).

probing    usable information about each label (V2), beside shuffled labels; the online code of the answer (V3)
erasing    the answer taken out of all meta-tokens' states, in one layer or in all: what it costs the answer (E6)
capacity   recall against the task's own size, such as the items that stand behind a meta-token (E7)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis import ops
from metatokens.analysis.lens import Lens
from metatokens.analysis.probes import LinearEraser, fit_eraser, online_code, v_information
from metatokens.analysis.recording import At, Findings
from metatokens.analysis.sampled_states import ANSWER, BATCH_SIZE, Sample, Samples, padded_prompts
from metatokens.config.analysis import AnalysisConfig, FittedState, TaskSubject
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.evaluation.recall import count_right_answers, make_test_instances
from metatokens.evaluation.statistics import Interval
from metatokens.tasks.base import PieceEncoder

ERASED_LABELS = 16
"""The most frequent answers, whose instances alone are erased and asked: with as many labels as dimensions an eraser
takes everything."""
MOST_SIZES = 8
PAST_STATES: tuple[FittedState, ...] = ("last meta-token", "token before it", "untrained")
"""Asked for what stands before them, too."""
CODED_STATES: tuple[FittedState, ...] = ("last meta-token", "token before it", "last token")
"""Of which an online code is made: ten probes each."""
_BATCH = 16

Array = npt.NDArray[np.float64]


def measure_probes(samples: Samples, config: AnalysisConfig, findings: Findings) -> None:
    """Fit probes of the answer to every state, and of the other labels and by an online code to some."""
    for name, states in samples.states.items():
        for target, labels in samples.labels.items():
            exists = labels >= 0
            if len(np.unique(labels[exists])) < 2 or (target != ANSWER and name not in PAST_STATES):
                continue  # one label is no question
            at: At = {"state": name, "target": target}
            information = v_information(
                states[exists], labels[exists], np.flatnonzero(exists), config=config.probe, seed=config.seed
            )
            usable = information.pointwise.mean(axis=0)
            findings.add("probes", "v_information", "nats", "V2", usable, at=at)
            gained = usable - information.shuffled_pointwise.mean(axis=0)
            findings.add("probes", "selectivity", "nats", "V2", gained, at=at)
            if target == ANSWER:
                left = information.null_entropy - usable
                findings.add("probes", "remaining_entropy", "nats", "V2", left, at=at)
        if name in CODED_STATES:
            _record_code(name, states, samples.labels[ANSWER], config, findings)


def _record_code(
    name: str, states: npt.ArrayLike, labels: npt.NDArray[np.int64], config: AnalysisConfig, findings: Findings
) -> None:
    code = online_code(states, labels, np.arange(len(labels)), config=config.probe, seed=config.seed)
    for metric, ratio in (
        ("compression", code.compression),
        ("compression_of_prior", code.compression_of_prior),
        ("compression_of_shuffled", code.uniform_length / float(code.shuffled_lengths.mean())),
    ):
        one_code = Interval(ratio, None, None)  # of all instances together: there is nothing to resample
        at: At = {"state": name, "target": ANSWER}
        findings.add_interval("probes", metric, "ratio", "V3", one_code, documents=len(labels), at=at)


def measure_erasure(lens: Lens, samples: Sequence[Sample], findings: Findings) -> None:
    """Erase what linear probes find of the answer in the states of meta-tokens, and ask for the answer again.

    Erasers are fitted to half of the instances and tested on the other half. "All layers" erases after one block after
    the other, each eraser fitted to states that those before it have changed. The control erases shuffled labels.

    Raises:
        UsageError: fewer than two answers that occur.
    """
    occurring, counts = np.unique([sample.label for sample in samples], return_counts=True)
    kept = set(occurring[np.argsort(-counts, kind="stable")[:ERASED_LABELS]].tolist())
    chosen = [sample for sample in samples if sample.label in kept]
    if len(kept) < 2 or len(chosen) < 4:
        raise UsageError(
            "answers to erase", expected="at least 2", found=str(len(kept)), remedy="raise subject.fitted_instances"
        )
    fitted, tested = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    full_loss, full_right = _ask(lens, tested, [])
    single = [[layer] for layer in range(len(lens.layout.blocks) - 1)]  # what leaves the last reaches no other token
    every = [layer for layers in single for layer in layers]
    true = np.array([sample.label for sample in fitted])
    shuffled = np.random.Generator(np.random.PCG64(findings.seed)).permutation(true)
    for name, labels in (("answer", true), ("shuffled", shuffled)):
        for layers in [*single, *([every] if len(every) > 1 else [])]:
            loss, right = _ask(lens, tested, _fit_erasers(lens, fitted, labels, layers))
            at: At = {"erased": name} | ({"layer": layers[0]} if len(layers) == 1 else {})
            findings.add("probes", "erasure_loss", "nats", "E6", loss - full_loss, at=at, test=True)
            findings.add("probes", "erasure_accuracy", "1", "E6", right - full_right, at=at, test=True)


def measure_capacity(
    lens: Lens, encoder: TextEncoder, subject: TaskSubject, config: AnalysisConfig, findings: Findings
) -> None:
    """Record accuracy by the task's own size, from the smallest that it was asked at to twice the largest."""
    low, high = subject.difficulty.size
    sizes = sorted({round(size) for size in np.linspace(low, 2 * high, min(MOST_SIZES, 2 * high - low + 1))})
    for size in sizes:
        try:
            instances = make_test_instances(
                subject.task,
                subject.difficulty.model_copy(update={"size": (size, size)}),
                encoder=PieceEncoder(encoder),
                meta_token_id=int(lens.model.config.meta_token_id),
                seed=config.seed,
                instances=config.documents,
            )
        except UsageError:
            findings.not_run.append(f"capacity at size {size}: no prompt of these lengths")
            continue
        found = count_right_answers(lens.model, instances, batch_size=_BATCH)
        findings.add_accuracy("capacity", "E7", found.right_answers / found.answers, at={"size": size})


Erasers = list[tuple[int, LinearEraser]]
"""Layers, rising, and what is done to the meta-tokens that leave them."""


def _fit_erasers(lens: Lens, samples: Sequence[Sample], labels: npt.NDArray[np.int64], layers: list[int]) -> Erasers:
    """Fit an eraser of labels, one a sample, to all meta-tokens before the answer, layer after layer."""
    erasers: Erasers = []
    for layer in layers:
        name = f"blocks.{layer}.hook_resid_post"
        states, of_state = [], []
        for start in range(0, len(samples), BATCH_SIZE):
            batch = samples[start : start + BATCH_SIZE]
            ids, is_meta = _padded(lens, batch)
            with lens.edit(*_edits(erasers, is_meta)), lens.capture([name], at=is_meta) as captured:
                lens(ids, use_cache=False, logits_to_keep=1)
                states.append(captured[name].double().numpy(force=True))
            of_state.append(np.repeat(labels[start : start + BATCH_SIZE], is_meta.sum(1).tolist()))
        erasers.append((layer, fit_eraser(np.concatenate(states), np.concatenate(of_state))))
    return erasers


def _ask(lens: Lens, samples: Sequence[Sample], erasers: Erasers) -> tuple[Array, Array]:
    """Return the cross-entropy of each answer's first token in nats, and 1 where it is the most likely one."""
    losses, right = [], []
    for start in range(0, len(samples), BATCH_SIZE):
        batch = samples[start : start + BATCH_SIZE]
        ids, is_meta = _padded(lens, batch)
        row = torch.arange(len(batch), device=ids.device)
        last, label = (torch.tensor([getattr(s, key) for s in batch], device=ids.device) for key in ("last", "label"))
        with lens.edit(*_edits(erasers, is_meta)):
            log_p = lens(ids, use_cache=False).logits[row, last].double().log_softmax(-1)
        losses.append(-log_p[row, label].numpy(force=True))
        right.append((log_p.argmax(-1) == label).double().numpy(force=True))
    return np.concatenate(losses), np.concatenate(right)


def _padded(lens: Lens, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return the prompts (B, T) and their meta-tokens before the last answer, (B, T) bool."""
    ids = padded_prompts(lens, samples)
    last = torch.tensor([sample.last for sample in samples], device=ids.device)
    is_before = torch.arange(ids.shape[1], device=ids.device) <= last[:, None]
    return ids, (ids == lens.model.config.meta_token_id) & is_before


def _edits(erasers: Erasers, is_meta: Tensor) -> list[ops.Edit]:
    return [
        ops.transform(f"blocks.{layer}.hook_resid_post", partial(_erase, eraser), at=is_meta)
        for layer, eraser in erasers
    ]


def _erase(eraser: LinearEraser, states: Tensor) -> Tensor:
    mean, projection = (torch.from_numpy(array).to(states) for array in (eraser.mean, eraser.projection))
    return mean + (states - mean) @ projection
