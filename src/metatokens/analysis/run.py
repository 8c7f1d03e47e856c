"""The whole analysis of one model: every measure that its subject allows, in one set of results."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from metatokens.analysis.claims import judge
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.kept import KeptMeasures
from metatokens.analysis.measures import MEASURES, Measure, Row, correct, record_of
from metatokens.analysis.results import Results, TokenView
from metatokens.analysis.token_view import views_of
from metatokens.config.analysis import AnalysisConfig, Part, TaskSubject
from metatokens.errors import NumericError, UsageError, redact_values
from metatokens.graft.grafting import NAME
from metatokens.storage import json_sha256

Say = Callable[[str], None]
Progress = Callable[[str, float], None]
ROOMS = {
    "attention": ("sharpening", "distance"),
    "causal": ("recall", "paths", "patching", "knockout", "eviction"),
    "graft": ("losses", "readout", "anchor_attention"),
    "compression": ("rate_distortion", "probes", "erasure"),
    "representations": ("similarity", "decodability", "logits", "attribution"),
}
"""The modules that hold measures, by room; importing one registers its measures."""
for _room, _modules in ROOMS.items():
    for _module in _modules:
        import_module(f"metatokens.analysis.{_room}.{_module}")


@dataclass(frozen=True)
class Identity:
    """What was analysed, for the header of the report."""

    name: str
    weights_sha256: str
    command: str


def analyze(
    model: Any,
    tokenizer: Tokenizer,
    config: AnalysisConfig,
    *,
    identity: Identity,
    say: Say = lambda _: None,
    progress: Progress = lambda _name, _share: None,
    keep: Path | None = None,
) -> tuple[Results, dict[str, npt.NDArray[Any]]]:
    """Measure what the config asks for and return the results with their arrays.

    Args:
        model: in evaluation mode.
        tokenizer: of its text.
        config: what is measured, on which subject.
        identity: of the model and the command, for the header.
        say: called with a line of text before each part.
        progress: called with the name of each measure that runs and the share of the measures that are done before it.
        keep: folder of the finished measures, where a stopped analysis leaves what it had; without one, or if
            it holds those of another model, config or document, every measure runs.

    Raises:
        UsageError: A model without meta-tokens, too few or too short documents.
        ValueError: A model in training mode.
    """
    inputs = Inputs(model, tokenizer, config)
    versions = {name: version(name) for name in ("metatokens", "numpy", "torch", "transformers")}
    versions |= {"python": platform.python_version()}
    settings = config.model_dump(mode="json")
    kept = KeptMeasures(keep, inputs, {"config": settings, "weights": identity.weights_sha256, "versions": versions})
    found: dict[str, list[Row]] = {}
    parts = list(dict.fromkeys(config.parts))
    total = sum(len(measures_of(part, config)) for part in parts)
    for part in parts:
        measures = measures_of(part, config)
        if measures:
            say(f"{part} ...")
        elif part not in ("token_view", "graft"):
            inputs.skip(f"{part}: not for a {config.subject.kind}")
        for one in measures:
            rows = kept.find(one)
            if rows is None:
                progress(one.name, len(found) / total)
                rows = kept.run(one)
            found[one.name] = rows
    records = [record_of(MEASURES[name], row, seed=config.seed) for name, rows in found.items() for row in rows]
    views: list[TokenView] = []
    shows_tokens = "token_view" in config.parts and config.token_views > 0
    if shows_tokens and config.subject.kind == "graft":
        inputs.skip("token_view: not for a graft")
    elif shows_tokens:
        say("token_view ...")
        try:
            views = views_of(inputs)
        except (UsageError, NumericError) as error:
            inputs.skip(f"token_view: {error}")
    data = redact_values(_describe_data(inputs))
    results = Results(
        title=f"Inside {identity.name}: {data['subject']}",
        checkpoint=_describe(inputs.model, identity),
        config=redact_values(settings),
        config_sha256=json_sha256(settings),
        endpoints_sha256=json_sha256(sorted(config.endpoints)),
        data=data,
        seed=config.seed,
        versions=versions,
        command=identity.command,
        not_run=tuple(inputs.skipped),
        records=tuple(correct(records)),
        # the paper claims nothing about a graft
        verdicts=() if config.subject.kind == "graft" else tuple(judge(found, config.endpoints, seed=config.seed)),
        token_views=tuple(views),
    )
    return results, inputs.arrays


def measures_of(part: Part, config: AnalysisConfig) -> Sequence[Measure]:
    """Return the measures of a part that the subject allows, in the order of the rooms."""
    kind = config.subject.kind
    kinds = ("graft",) if kind == "graft" else (None, kind)
    return [one for one in MEASURES.values() if one.part == part and one.subject in kinds]


def _describe(model: Any, identity: Identity) -> dict[str, Any]:
    config = model.config
    return {
        "name": identity.name,
        "sha256": identity.weights_sha256,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        **_describe_anchors(model, config),
        "training seeds": 1,
    }


def _describe_anchors(model: Any, config: Any) -> dict[str, Any]:
    added = getattr(model, NAME, None)
    if added is None:
        return {"position encoding": getattr(config, "position_encoding", "learned")}
    return {name: getattr(added.config, name) for name in ("window", "num_sinks", "anchors", "every", "positions")}


def _describe_data(inputs: Inputs) -> dict[str, Any]:
    subject, documents = inputs.config.subject, inputs.subject.documents
    lengths = [document.input_ids.shape[1] for document in documents]
    is_task = isinstance(subject, TaskSubject)
    num_meta = [int(document.is_meta.sum()) for document in documents]
    return {
        "subject": f"task {subject.task.kind}" if isinstance(subject, TaskSubject) else f"text of {subject.source}",
        "instances" if is_task else "documents": len(documents),
        "positions": f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0]),
        **({} if subject.kind == "graft" else {"meta-tokens each": f"{np.mean(num_meta):.1f}"}),
    }
