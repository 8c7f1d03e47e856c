"""Rate and distortion of the states around a recall task's last meta-token (V1).

All states are asked for the same label, the first token of the last answer. The paper's claim is judged by its own
comparison, against the last token, which has read the question too. Deviation: the meta-token's state is compared with
six more states, of which the token right before it has read the same prefix and is judged as well.
"""

from __future__ import annotations

import numpy as np

from metatokens.analysis.fitting import corrected_entropy
from metatokens.analysis.rate_distortion import RateDistortionCurve, compare_hulls, rate_distortion_curve
from metatokens.analysis.recording import At, Findings
from metatokens.analysis.sampled_states import ANSWER, Samples
from metatokens.config.analysis import AnalysisConfig, Endpoint, FittedState
from metatokens.errors import UsageError
from metatokens.evaluation.statistics import Interval

META: FittedState = "last meta-token"
_ENDPOINTS: dict[str, Endpoint] = {"last token": "area", "token before it": "prefix_area"}


def measure_compression(samples: Samples, config: AnalysisConfig, findings: Findings) -> None:
    """Fit bottlenecks to every state, and compare that of the meta-token with the others at equal rate.

    Raises:
        UsageError: all instances have the same answer, or there are too few of them.
    """
    labels = samples.labels[ANSWER]
    if len(np.unique(labels)) < 2:
        raise UsageError(
            "answers", expected="at least 2 that differ", found="one alone", remedy="choose another task or tokenizer"
        )
    instances = np.arange(len(labels))
    curves = {}
    for name, states in samples.states.items():
        curve = rate_distortion_curve(states, labels, instances, config=config.rate_distortion, seed=config.seed)
        curves[name] = curve
        _record_curve(name, curve, findings)
    num_test = len(next(iter(curves.values())).document_ids)
    # many labels and few test instances would put the line far below what no rate leaves
    entropy = Interval(corrected_entropy(labels), None, None)
    note = f"of the labels of {len(labels)} instances, Miller-Madow: no interval"
    findings.add_interval(
        "rate_distortion", "label_entropy", "nats", "V1", entropy, documents=len(labels), at={}, note=note
    )
    if META not in curves:
        return
    for other in [name for name in curves if name != META]:
        compared = compare_hulls(curves[META], curves[other], seed=config.seed)
        for metric, unit, interval in (("area", "nats^2", compared.area), ("mean_gap", "nats", compared.mean_gap)):
            findings.add_interval(
                "rate_distortion", metric, unit, "V1", interval, documents=num_test, at={"against": other}
            )
        if other in _ENDPOINTS:
            findings.intervals[_ENDPOINTS[other]] = compared.area, num_test


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
