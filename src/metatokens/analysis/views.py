"""Which texts are shown token by token: the first documents and, of a task, the prompt of a minimal pair."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from metatokens.analysis.causal.pairs import MinimalPair, make_minimal_pair
from metatokens.analysis.causal.patching import patch_map
from metatokens.analysis.inputs import Subject
from metatokens.analysis.recording import Findings
from metatokens.analysis.representations.similarity import calibrate
from metatokens.analysis.results import TokenView
from metatokens.analysis.token_view import MeasuredView, measure_token_view
from metatokens.config.analysis import AnalysisConfig, TaskSubject
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.lens.lens import Lens
from metatokens.tasks.base import PieceEncoder


def measure_views(
    lens: Lens, subject: Subject, tokenizer: Tokenizer, config: AnalysisConfig, findings: Findings
) -> list[TokenView]:
    """Show some documents token by token, and of a task one prompt of a minimal pair with its patch effects."""
    calibrations = calibrate(lens, [{"input_ids": document.input_ids} for document in subject.calibration])
    views: list[TokenView] = []

    def keep(title: str, measured: MeasuredView) -> None:
        view, arrays = measured.named(title, f"view{len(views)}")
        views.append(view)
        findings.arrays.update(arrays)

    for document in subject.documents[: config.token_views]:
        ids = document.input_ids[0, : config.view_tokens]
        keep(document.name, measure_token_view(lens, ids, tokenizer.decode, calibrations=calibrations))
    if not isinstance(config.subject, TaskSubject):
        return views
    found = _first_pair(lens, TextEncoder(tokenizer), config.subject, config)
    if found is None:
        findings.not_run.append(
            f"patch effects: no minimal pair of at most {config.view_tokens} tokens with a meta-token behind the item"
        )
        return views
    number, pair = found
    measured = measure_token_view(
        lens,
        torch.from_numpy(pair.clean).to(lens.model.device),
        tokenizer.decode,
        calibrations=calibrations,
        patch_effect=patch_map(lens, pair),
    )
    keep(f"minimal pair {number}: clean prompt", measured)
    return views


def _first_pair(
    lens: Lens, encoder: TextEncoder, subject: TaskSubject, config: AnalysisConfig
) -> tuple[int, MinimalPair] | None:
    """Return the first pair that is short enough for a view and has a meta-token behind its item, with its number."""
    for number in range(subject.pairs):
        try:
            pair = make_minimal_pair(
                subject.task,
                subject.difficulty,
                encoder=PieceEncoder(encoder),
                meta_token_id=int(lens.model.config.meta_token_id),
                seed=config.seed,
                index=number,
            )
        except UsageError:  # the causal part says why
            return None
        if len(pair.later_meta_positions) and len(pair.clean) <= config.view_tokens:
            return number, pair
    return None
