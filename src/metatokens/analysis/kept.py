"""The finished measures of an analysis that has not ended: a killed one goes on behind them, to the same bytes.

A file for each measure holds its rows, and what it left beside them in the inputs. What measures share, such as runs of
the model, is not kept: a measure that needs it computes it again.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Measure, Row, run_measure
from metatokens.analysis.results import read_archive, write_archive
from metatokens.errors import ResourceError, UsageError
from metatokens.evaluation.statistics import Interval
from metatokens.storage import json_sha256, make_folder, write_atomically

KEPT_NAME = "unfinished"


class KeptMeasures:
    """Runs measures, and keeps what each found in a folder; one that is there already does not run."""

    def __init__(self, folder: Path | None, inputs: Inputs, identity: Mapping[str, Any]) -> None:
        """Keep nothing without a folder.

        Args:
            folder: made as soon as there is something to keep; what it holds of another analysis is replaced.
            inputs: what measures look at; its documents are part of what tells this analysis from others.
            identity: of the model, of the config and of all else that the numbers depend on; plain values.
        """
        self._folder, self._inputs = folder, inputs
        looked_at = (*inputs.subject.documents, *inputs.subject.calibration)
        documents = [document.input_ids.tolist() for document in looked_at]
        self._identity = json_sha256({**identity, "documents": documents})

    def find(self, chosen: Measure) -> list[Row] | None:
        """Return the rows of a measure that has finished, and put back what it left in the inputs; None if none has."""
        if self._folder is None:
            return None
        try:
            arrays = read_archive(self._folder / f"{chosen.name}.npz")
            head = json.loads(arrays.pop("head").tobytes())
            if head["identity"] != self._identity:
                return None
            rows = [_row_of(one, arrays.pop(f"row {number}", None)) for number, one in enumerate(head["rows"])]
        except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile):
            return None
        for reason in head["skipped"]:
            self._inputs.skip(reason)
        self._inputs.arrays.update(arrays)
        return rows

    def run(self, chosen: Measure) -> list[Row]:
        """Run a measure, keep what it found and return its rows; without room to keep it, warn."""
        num_skipped, before = len(self._inputs.skipped), set(self._inputs.arrays)
        rows = run_measure(chosen, self._inputs)
        if self._folder is not None:
            left = {name: array for name, array in self._inputs.arrays.items() if name not in before}
            try:
                self._keep(self._folder, chosen.name, rows, self._inputs.skipped[num_skipped:], left)
            except (ResourceError, UsageError) as error:
                warnings.warn(f"{error}; the analysis goes on, but begins anew if it is stopped", stacklevel=2)
                self._folder = None
        return rows

    def _keep(self, folder: Path, name: str, rows: list[Row], skipped: list[str], left: Mapping[str, Any]) -> None:
        head = {"identity": self._identity, "skipped": skipped, "rows": [_head_of(row) for row in rows]}
        values = {
            f"row {number}": np.asarray(row.values)
            for number, row in enumerate(rows)
            if not isinstance(row.values, Interval)
        }
        data = io.BytesIO()
        write_archive(data, {**left, **values, "head": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)})
        make_folder(folder)
        write_atomically(folder / f"{name}.npz", data.getvalue())


def _head_of(row: Row) -> dict[str, Any]:
    at = {axis: np.asarray(place).item() for axis, place in row.at.items()}  # numpy's numbers among them
    interval = vars(row.values) if isinstance(row.values, Interval) else None
    return {"at": at, "interval": interval, "num_documents": row.num_documents, "note": row.note}


def _row_of(head: Mapping[str, Any], values: npt.NDArray[Any] | None) -> Row:
    found = values if values is not None else Interval(**head["interval"])
    return Row(head["at"], found, head["num_documents"], head["note"])
