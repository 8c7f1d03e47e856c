"""Results come back as they were written, byte for byte, or are refused in one line."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metatokens.analysis import results as results_module
from metatokens.analysis.results import Record, Results, TokenView, Verdict, read_results, write_results
from metatokens.errors import DataError
from metatokens.storage import read_sealed


def sample() -> tuple[Results, dict[str, np.ndarray]]:
    records = [
        Record(
            measure="sharpening",
            unit="nats",
            at={"layer": layer, "head": 1},
            value=0.1 * layer,
            low=None,
            high=None,
            num_documents=9,
        )
        for layer in range(3)
    ]
    verdict = Verdict(
        claim="Entropy falls",
        paper="1.40",
        endpoint="mean sharpening",
        verdict="supported",
        value=0.2,
        low=0.1,
        high=0.3,
        unit="nats",
        num_documents=9,
    )
    view = TokenView(title="one", tokens=("a", "</script>"), is_meta=(False, True), arrays={"attention": "view0"})
    results = Results(
        title="t",
        checkpoint={"sha256": "0"},
        config={"seed": 0},
        config_sha256="1",
        endpoints_sha256="2",
        data={},
        seed=0,
        versions={"torch": "2"},
        command="metatokens analyze",
        records=records,
        verdicts=[verdict],
        token_views=[view],
    )
    return results, {"view0": np.arange(8, dtype=np.uint8).reshape(2, 4), "a": np.zeros(3)}


def test_results_come_back_and_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    results, arrays = sample()
    write_results(tmp_path / "one", results, arrays)
    found, found_arrays = read_results(tmp_path / "one")
    assert found == results
    assert found_arrays.keys() == arrays.keys()
    assert all(np.array_equal(found_arrays[name], arrays[name]) for name in arrays)
    write_results(tmp_path / "two", found, dict(reversed(found_arrays.items())))
    for name in ("results.json", "arrays.npz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [record.value for record in found.find("sharpening", layer=2)] == [0.2]
    assert len(found.find("sharpening", head=1)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document | {"schema_version": 3}, "expected schema_version 4, found 3"),
        (lambda document: document | {"colour": 1}, "colour: Extra inputs are not permitted"),
        (lambda document: {k: v for k, v in document.items() if k != "records"}, "records: Field required"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, change: object, message: str) -> None:
    write_results(tmp_path, *sample())
    path = tmp_path / "results.json"
    path.write_text(json.dumps(change(json.loads(read_sealed(path, remedy="")))))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        read_results(tmp_path)


def test_broken_or_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="write it anew"):
        read_results(tmp_path)
    results, arrays = sample()
    write_results(tmp_path, results, {"a": arrays["a"]})
    with pytest.raises(DataError, match="expected an array view0"):
        read_results(tmp_path)
    (tmp_path / "arrays.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="the arrays of the results"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="expected results of metatokens analyze"):
        read_results(tmp_path)


def test_arrays_of_another_analysis_are_refused(tmp_path: Path) -> None:
    results, arrays = sample()
    write_results(tmp_path, results, arrays)
    write_results(tmp_path / "other", results, arrays | {"a": np.ones(3)})
    (tmp_path / "other" / "arrays.npz").replace(tmp_path / "arrays.npz")
    with pytest.raises(DataError, match="expected the arrays of the results, found the SHA-256"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("shape", "limit", "message"),
    [("(8,)", 10, "more than 10 bytes, unpacked"), ("(1000000000000,)", 1000, "a.npy is shorter than its header")],
)
def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, limit: int, message: str
) -> None:
    write_results(tmp_path, *sample())
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8))
    monkeypatch.setattr(results_module, "_LARGEST_ARRAYS", limit)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path)
