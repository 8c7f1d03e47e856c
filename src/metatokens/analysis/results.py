"""What an analysis leaves behind: `results.json`, one record a number, and `arrays.npz` for what is too large for it.

A report renders these and computes nothing. The same analysis gives the same bytes: keys are sorted, no date is
written, and the archive's members have one fixed time.

The records, by section and metric. `at` says what a number belongs to; where a key is left out it is the mean over it,
of theory the ratio of sums over it, of a knockout all layers together. Layers count from 0; of states (similarity,
interchange) 0 is before the first block and L after the last.

    section          metric              unit         at
    attention        entropy_drop        nats         layer, head          without minus with the meta-tokens' embedding
                     log_odds_boost      nats         layer, head          ln P / (1 - P), with minus without
                     max_score_boost     logits       layer, head          largest score, with minus without
                     entropy             nats         layer, head
                     meta_mass           1            layer, head
                     meta_lift           ratio        layer, head
                     effective_keys      keys         layer, head          e^entropy
                     entropy_without_sink             layer, head          nats, of rows without their first key
                     mass_by_distance    1            layer, to, distance  mean over heads; from that distance to the
                                                                           next one; 0 is the token itself
    theory           share_above         1            layer                edges with x >= 0 in the ablated run
                     share_beyond        1            layer                boosted edges beyond the critical boost
                     mechanism           nats         layer                change of H that the meta keys' logits make
                     change              nats         layer                change of H, with minus without
                     r_squared           1            layer
                     sign_agreement      1            layer
    similarity       cosine              1            layer, distance, kind, form    ordinary, or meta, shuffled too
                     excess_cosine       1            layer, distance      centred, meta minus ordinary
    rate_distortion  rate, distortion    nats         state, beta
                     label_entropy       nats
                     area                nats^2       against              between hulls; positive: meta-tokens better
                     mean_gap            nats         against              the area over the width of its range
    probes           v_information       nats         state, target
                     selectivity         nats         state, target        minus that of shuffled labels
                     remaining_entropy   nats         state, target        of the answer, once the probe has spoken
                     compression         ratio        state, target        n ln K over the length of the online code
                     compression_of_prior             state, target        of the code by frequencies, over that length
                     compression_of_shuffled          state, target        the first with shuffled labels
                     erasure_loss        nats         layer, erased        rise of the answer's loss; all in turn
                     erasure_excess      nats         layer                that of the answer minus of shuffled labels
                     erasure_accuracy    1            layer, erased        change of the accuracy
                     erasure_information              layer, erased        nats that a probe of these states finds
    readouts         decodability        1            state, layer, window    R2 of the mean of the last tokens
                     prefix_rank         1            state, layer, window    mean reciprocal rank of the own prefix
                     prefix_rank_chance  1            state, window        that of a random order
                     cka                 1            state, layer, window    interval by the jackknife
                     reciprocal_rank     1            state, read, layer, distance    of the token so far before
                     log_probability     nats         state, read, layer, distance
                     divergence          nats         state, read, layer   KL(final || layer)
                     attribution         logits       component, layer     of the answer over its foil, or of
                                                                           a text token over the mean
                     branch_strength     ratio        branch, layer        length at meta-tokens over the stream's
                     max_logit_boost     logits       place                largest over mean, with minus without the
                                                                           meta-tokens' embedding
                     max_log_probability_boost        place                nats, with minus without
                     output_entropy_drop nats         place                without minus with
                     loss_drop           nats         place                without minus with
    causal           accuracy            1            intervention         none is the whole model
                     accuracy_change     1            intervention         minus that of the whole model
                     pair_accuracy       1            condition
                     logit_difference    logits       condition            full, direct cut, meta cut, both cut
                     interaction         logits
                     meta_path           logits                             direct cut minus both cut
                     interchange         1            layer, where, direction, window    share of the way to the
                                                                           other prompt's logit difference
                     knockout            nats         layer, mode          rise of the loss on the answer
                     capacity            1            size                 accuracy by the task's own size
    eviction         cost                nats/token   policy, kept         kept: share of the cache
    language_model   loss_change         nats/token   layer                without minus with meta-attention, or of all
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from metatokens.config.base import Frozen
from metatokens.errors import DataError

SCHEMA_VERSION = 2
RESULTS_NAME = "results.json"
ARRAYS_NAME = "arrays.npz"
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)

Section = Literal[
    "attention", "theory", "similarity", "readouts", "rate_distortion", "probes", "causal", "eviction", "language_model"
]
Arrays = Mapping[str, npt.NDArray[Any]]


class Record(Frozen):
    """One measured number."""

    section: Section
    metric: str
    unit: str
    method: str
    """Which definition: an id of the table in docs/guide/analysis.md."""
    at: dict[str, str | int | float] = Field(default_factory=dict)
    value: float | None
    """None where it cannot be computed; `note` says why."""
    low: float | None = None
    high: float | None = None
    num_documents: int = Field(ge=0)
    p_value: float | None = None
    adjusted_p: float | None = None
    """Corrected for all records of the same section and metric that have coordinates (Benjamini-Hochberg)."""
    note: str | None = None


VerdictName = Literal["supported", "the opposite holds", "inconclusive", "too few documents", "not tested"]
VERDICTS: tuple[VerdictName, ...] = get_args(VerdictName)


class Verdict(Frozen):
    """One claim of the paper, and what came of it here."""

    claim: str
    paper: str
    """The paper's own number, as text."""
    endpoint: str
    """Which number decides, and how; fixed before the run."""
    verdict: VerdictName
    """Not tested: nothing was measured."""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    num_documents: int = 0
    p_value: float | None = None
    """Adjusted over all verdicts (Holm)."""
    share_of_paper: float | None = None
    """`value` over the paper's own number, where it has one for the same quantity."""
    note: str | None = None

    @property
    def beside_paper(self) -> str:
        """The effect as a share of the paper's, in words; empty where the paper has no number for it."""
        return "" if self.share_of_paper is None else f"{100 * self.share_of_paper:.0f}% of the paper's"


class TokenView(Frozen):
    """One text, token by token."""

    title: str
    tokens: tuple[str, ...]
    is_meta: tuple[bool, ...]
    arrays: dict[str, str]
    """What is shown, to its key in arrays.npz."""


class Results(Frozen):
    """All that a report needs."""

    schema_version: Literal[2] = 2
    title: str
    checkpoint: dict[str, Any]
    config: dict[str, Any]
    config_sha256: str
    endpoints_sha256: str
    """Of the primary endpoints alone, so that it can be seen that they were not changed after the fact."""
    data: dict[str, Any]
    seed: int
    versions: dict[str, str]
    command: str
    not_run: tuple[str, ...] = ()
    records: tuple[Record, ...]
    verdicts: tuple[Verdict, ...] = ()
    token_views: tuple[TokenView, ...] = ()

    def find(self, section: Section, metric: str, **at: str | float) -> list[Record]:
        """Return the records of a metric whose coordinates include the given ones."""
        return [
            record
            for record in self.records
            if record.section == section
            and record.metric == metric
            and all(record.at.get(key) == value for key, value in at.items())
        ]


def write_results(folder: Path, results: Results, arrays: Arrays) -> None:
    """Write both files; the archive first, so that results.json says that all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / ARRAYS_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            data = io.BytesIO()
            np.lib.format.write_array(data, np.asarray(arrays[name]), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, data.getvalue())
    text = json.dumps(results.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False)
    (folder / RESULTS_NAME).write_text(f"{text}\n", encoding="utf-8")


def read_results(folder: Path) -> tuple[Results, dict[str, npt.NDArray[Any]]]:
    """Return what `write_results` wrote.

    Raises:
        DataError: files that are missing, broken or of another version.
    """
    remedy = "write it anew with metatokens analyze"
    path = folder / RESULTS_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(path), expected="results of metatokens analyze", found=str(error), remedy=remedy) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(str(path), expected=f"schema_version {SCHEMA_VERSION}", found=repr(version), remedy=remedy)
    try:
        results = Results.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(str(path), expected="the declared schema", found=found, remedy=remedy) from error
    try:
        with np.load(folder / ARRAYS_NAME, allow_pickle=False) as archive:
            arrays = dict(archive)
        if "theory_points" in arrays and arrays["theory_points"].shape[1:] != (4,):
            raise ValueError(f"theory_points of shape {arrays['theory_points'].shape}")
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            str(folder / ARRAYS_NAME), expected="the arrays of the results", found=str(error), remedy=remedy
        ) from error
    missing = sorted({key for view in results.token_views for key in view.arrays.values()} - arrays.keys())
    if missing:
        raise DataError(
            str(folder / ARRAYS_NAME), expected=f"an array {missing[0]}", found="none of that name", remedy=remedy
        )
    return results, arrays
