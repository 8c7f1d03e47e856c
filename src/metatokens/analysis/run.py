"""The whole analysis of one model: every part that its subject allows, in one set of results.

For instances of a recall task: attention and the theorem's audit, zeroing, minimal pairs, rate and distortion, probes.
For text: attention and the audit, similarity, eviction, knock-out. For both: what can be read from states, and what the
parts of the model add to its output. A part that cannot run is named with its reason.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from metatokens.analysis.causal.pairs import MinimalPair
from metatokens.analysis.claims import judge
from metatokens.analysis.compression.curves import measure_compression
from metatokens.analysis.compression.labelled_states import Sample, Samples, collect_samples, draw_samples
from metatokens.analysis.inputs import Subject, task_subject, text_subject
from metatokens.analysis.measuring import (
    measure_attention,
    measure_distances,
    measure_evictions,
    measure_interchange,
    measure_knock_outs,
    measure_knock_outs_on_pairs,
    measure_paths,
    measure_similarity,
    measure_zeroing,
    usable_pairs,
)
from metatokens.analysis.probing import measure_capacity, measure_erasure, measure_probes
from metatokens.analysis.readouts import (
    measure_attribution,
    measure_decodability,
    measure_logit_lenses,
    measure_output_changes,
    measure_strengths,
    measure_text_attribution,
)
from metatokens.analysis.recording import Findings
from metatokens.analysis.results import Results, TokenView
from metatokens.analysis.views import measure_views
from metatokens.config.analysis import AnalysisConfig, Part, TaskSubject, TextSubject
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import NumericError, UsageError
from metatokens.lens.lens import Lens

Say = Callable[[str], None]


@dataclass(frozen=True)
class Identity:
    """What was analysed, for the header of the report."""

    name: str
    weights_sha256: str
    command: str


def analyze(
    model: Any, tokenizer: Tokenizer, config: AnalysisConfig, *, identity: Identity, say: Say = lambda _: None
) -> tuple[Results, dict[str, npt.NDArray[Any]]]:
    """Measure what the config asks for and return the results with their arrays.

    Raises:
        UsageError: a model in training mode or without meta-tokens, too few or too short documents.
    """
    lens = Lens(getattr(model, "wrapped", model))
    encoder = TextEncoder(tokenizer)
    if isinstance(config.subject, TaskSubject):
        subject = task_subject(lens.model, encoder, config, config.subject)
    else:
        subject = text_subject(lens.model, encoder, config, config.subject)
    findings = Findings(config.seed)
    views: list[TokenView] = []

    def show() -> None:
        views.extend(measure_views(lens, subject, tokenizer, config, findings))

    possible = _parts(lens, subject, encoder, config, findings)
    for part, measures in possible.items():
        if part in config.parts:
            say(f"{part} ...")
            for measure in measures:
                _run(part, measure, findings)
    findings.not_run += [
        f"{part}: not for a {config.subject.kind}"
        for part in config.parts
        if part not in possible and part != "token_view"
    ]
    if "token_view" in config.parts and config.token_views:
        say("token_view ...")
        _run("token_view", show, findings)
    records = findings.finished_records()
    results = Results(
        title=f"Inside {identity.name}",
        checkpoint=_describe(lens.model, identity),
        config=config.model_dump(mode="json"),
        config_sha256=_digest(config.model_dump(mode="json")),
        endpoints_sha256=_digest(sorted(config.endpoints)),
        data=_describe_data(config, subject),
        seed=config.seed,
        versions={name: version(name) for name in ("metatokens", "numpy", "torch", "transformers")}
        | {"python": platform.python_version()},
        command=identity.command,
        not_run=tuple(dict.fromkeys(findings.not_run)),  # several measures may lack the same
        records=tuple(records),
        verdicts=tuple(judge(findings.endpoints, config.endpoints, seed=config.seed, intervals=findings.intervals)),
        token_views=tuple(views),
    )
    return results, findings.arrays


def _parts(
    lens: Lens, subject: Subject, encoder: TextEncoder, config: AnalysisConfig, findings: Findings
) -> Mapping[Part, Sequence[Callable[[], None]]]:
    """Return what can be measured of the subject, in order; a measure that fails leaves the others of its part."""
    of = config.subject
    parts: dict[Part, Sequence[Callable[[], None]]] = {
        "attention": [
            lambda: measure_attention(lens, subject, config, findings),
            lambda: measure_distances(lens, subject, config, findings),
        ],
        "decodability": [lambda: measure_decodability(lens, subject, seed=config.seed, findings=findings)],
    }
    output = [
        lambda: measure_output_changes(lens, subject, findings=findings),
        lambda: measure_strengths(lens, subject, findings=findings),
        lambda: measure_logit_lenses(lens, subject, findings=findings),
    ]
    if isinstance(of, TextSubject):
        parts["output"] = [*output, lambda: measure_text_attribution(lens, subject, findings=findings)]
        parts["similarity"] = [lambda: measure_similarity(lens, subject, config, findings)]
        parts["eviction"] = [lambda: measure_evictions(lens, subject, of, config, findings)]
        parts["knockout"] = [lambda: measure_knock_outs(lens, subject, findings)]
        return parts

    @cache
    def pairs() -> list[MinimalPair]:
        return usable_pairs(lens, encoder, of, seed=config.seed, findings=findings)

    @cache
    def drawn() -> list[Sample]:
        return draw_samples(lens, encoder, of, seed=config.seed)

    @cache
    def collected() -> Samples:
        return collect_samples(lens, encoder, drawn(), states=config.states, seed=config.seed)

    parts["output"] = output
    parts["causal"] = [
        lambda: measure_zeroing(lens, subject, findings),
        lambda: measure_paths(lens, pairs(), findings),
        lambda: measure_interchange(lens, pairs(), findings),
        lambda: measure_attribution(lens, pairs(), findings=findings),
        lambda: measure_knock_outs_on_pairs(lens, pairs(), findings),
        lambda: measure_capacity(lens, encoder, of, config, findings),
    ]
    parts["rate_distortion"] = [lambda: measure_compression(collected(), config, findings)]
    parts["probes"] = [
        lambda: measure_probes(collected(), config, findings),
        lambda: measure_erasure(lens, drawn(), config, findings),
    ]
    return parts


def _run(part: Part, run: Callable[[], None], findings: Findings) -> None:
    """Run a measure; one that this model or these documents do not allow is named, the others go on."""
    try:
        run()
    except (UsageError, NumericError) as error:
        findings.not_run.append(f"{part}: {error}")


def _describe(model: Any, identity: Identity) -> dict[str, Any]:
    config = model.config
    return {
        "name": identity.name,
        "sha256": identity.weights_sha256,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "position encoding": getattr(config, "position_encoding", "learned"),
        "training seeds": 1,
    }


def _describe_data(config: AnalysisConfig, subject: Subject) -> dict[str, Any]:
    lengths = [document.input_ids.shape[1] for document in subject.documents]
    is_task = isinstance(config.subject, TaskSubject)
    return {
        "subject": f"task {config.subject.task.kind}"
        if isinstance(config.subject, TaskSubject)
        else f"text of {config.subject.source}",
        "instances" if is_task else "documents": len(subject.documents),
        "positions": f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0]),
        "meta-tokens each": f"{np.mean([int(document.is_meta.sum()) for document in subject.documents]):.1f}",
    }


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
