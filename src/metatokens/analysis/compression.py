"""Rate, distortion and usable information of the states around a recall task's last meta-token (V1, V2).

Three states after the last block, of many instances of the test split:

    last meta-token     the last before the last answer
    token before it     the nearest text token in front of that: the same prefix but for meta-tokens
    last token          the one that the answer is predicted from

All are asked for the same label, the first token of the last answer. The comparison with equal prefix is the fair one;
the last token is trained to give the answer and has read more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from metatokens.analysis.lens import Lens
from metatokens.analysis.probes import v_information
from metatokens.analysis.rate_distortion import RateDistortionCurve, compare_hulls, rate_distortion_curve
from metatokens.analysis.recording import At, Findings
from metatokens.config.analysis import AnalysisConfig, TaskSubject
from metatokens.data.injection import IntArray
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.evaluation.recall import make_test_instances
from metatokens.evaluation.statistics import Interval
from metatokens.tasks.base import PieceEncoder
from metatokens.tasks.encoding import EncodedInstance, pad

META, BEFORE, LAST = "last meta-token", "token before it", "last token"
STATES = (META, BEFORE, LAST)
_BATCH = 64


def measure_compression(
    lens: Lens, encoder: TextEncoder, subject: TaskSubject, config: AnalysisConfig, findings: Findings
) -> None:
    """Fit bottlenecks and probes to the three states, and compare them at equal rate."""
    states, labels = collect_states(lens, encoder, subject, seed=config.seed)
    instances = np.arange(len(labels))
    curves = {}
    for name in STATES:
        curve = rate_distortion_curve(states[name], labels, instances, config=config.rate_distortion, seed=config.seed)
        curves[name] = curve
        _record_curve(name, curve, findings)
        information = v_information(states[name], labels, instances, config=config.probe, seed=config.seed)
        at: At = {"state": name, "target": "answer"}
        usable = information.pointwise.mean(axis=0)
        findings.add("probes", "v_information", "nats", "V2", usable, at=at)
        gained = usable - information.shuffled_pointwise.mean(axis=0)
        findings.add("probes", "selectivity", "nats", "V2", gained, at=at)
    some = curves[META]
    num_test = len(some.document_ids)
    plug_in = Interval(some.label_entropy, None, None)  # of the test labels' own frequencies
    findings.add_interval("rate_distortion", "label_entropy", "nats", "V1", plug_in, documents=num_test, at={})
    for other in (BEFORE, LAST):
        compared = compare_hulls(curves[META], curves[other], seed=config.seed)
        for metric, unit, interval in (("area", "nats^2", compared.area), ("mean_gap", "nats", compared.mean_gap)):
            findings.add_interval(
                "rate_distortion", metric, unit, "V1", interval, documents=num_test, at={"against": other}
            )
        if other == BEFORE:
            findings.intervals["area"] = compared.area, num_test


def collect_states(
    lens: Lens, encoder: TextEncoder, subject: TaskSubject, *, seed: int
) -> tuple[dict[str, npt.NDArray[np.float32]], IntArray]:
    """Return the three states (n, C) of instances, and their labels (n,).

    Raises:
        UsageError: no instance has a text token before its last meta-token.
    """
    config = lens.model.config
    instances = make_test_instances(
        subject.task,
        subject.difficulty,
        encoder=PieceEncoder(encoder),
        meta_token_id=config.meta_token_id,
        seed=seed + 1,  # others than those that are shown
        instances=subject.fitted_instances,
    )
    usable = [(row, places) for row in instances if (places := _places(row, config.meta_token_id)) is not None]
    if not usable:
        raise UsageError(
            "states of meta-tokens",
            expected="a text token and a meta-token before the answer",
            found=f"none in {len(instances)} instances",
            remedy="choose a task that places meta-tokens",
        )
    name = f"blocks.{len(lens.layout.blocks) - 1}.hook_resid_post"
    parts = []
    for rows in _batches(usable):
        batch = pad([row for row, _ in rows], meta_token_id=config.meta_token_id, pad_token_id=config.pad_token_id)
        with lens.capture([name], dtype=torch.float32, device="cpu") as captured:
            lens(torch.from_numpy(batch.input_ids).to(lens.model.device), use_cache=False, logits_to_keep=1)
        at = torch.tensor([places for _, places in rows])
        parts.append(captured[name].gather(1, at[..., None].expand(-1, -1, captured[name].shape[-1])))
    found = torch.cat(parts).numpy()
    labels = np.array([row.input_ids[row.answer_spans[-1][0]] for row, _ in usable], dtype=np.int64)
    return {state: found[:, index] for index, state in enumerate(STATES)}, labels


def _places(row: EncodedInstance, meta_token_id: int) -> tuple[int, int, int] | None:
    """Return the positions of the three states; None where there is no such meta-token."""
    answer = row.answer_spans[-1][0]
    is_meta = row.input_ids[:answer] == meta_token_id
    metas = np.flatnonzero(is_meta)
    if not len(metas):
        return None
    before = np.flatnonzero(~is_meta[: metas[-1]])
    return (int(metas[-1]), int(before[-1]), answer - 1) if len(before) else None


def _batches(
    rows: Sequence[tuple[EncodedInstance, tuple[int, int, int]]],
) -> Iterator[Sequence[tuple[EncodedInstance, tuple[int, int, int]]]]:
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]


def _record_curve(name: str, curve: RateDistortionCurve, findings: Findings) -> None:
    for index, beta in enumerate(curve.betas):
        at: At = {"state": name, "beta": float(beta)}
        findings.add("rate_distortion", "rate", "nats", "V1", curve.rates[index].mean(axis=0), at=at)
        findings.add("rate_distortion", "distortion", "nats", "V1", curve.distortions[index].mean(axis=0), at=at)
    if not curve.converged.all():
        stopped = int((~curve.converged).sum())
        findings.not_run.append(
            f"rate_distortion: {stopped} of {curve.converged.size} heads of {name} ran out of steps"
        )
