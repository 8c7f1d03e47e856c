"""The page is one file, the same for the same results, and says what the results say."""

import base64
import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from metatokens.analysis.results import Record, Results, write_results
from metatokens.analysis.run import MEASURES
from metatokens.errors import DataError
from metatokens.report import page as page_module
from metatokens.report.analysis_figures import FIGURES, figure_files
from metatokens.report.glossary import AXES
from metatokens.report.numbers import format_estimate
from metatokens.report.page import render_page, write_report
from synthetic_results import HOSTILE, build_results

KEPT = Path(__file__).parents[3] / "experiments" / "tiny-analysis"
FEW = ("sharpening", "mass_by_distance", "logit_difference", "rate", "distortion")
"""Measures that are drawn in all ways."""


def of_measures(results: Results, names: Iterable[str]) -> Results:
    records = tuple(record for record in results.records if record.measure in set(names))
    return results.model_copy(update={"records": records})


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(*build_results())


@pytest.mark.slow
def test_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results, arrays = build_results()
    write_results(tmp_path / "results", of_measures(results, FEW), arrays)
    first = write_report(tmp_path / "results", tmp_path / "one").read_bytes()
    assert write_report(tmp_path / "results", tmp_path / "two").read_bytes() == first
    figures = sorted(path.name for path in (tmp_path / "one" / "figures").iterdir())
    drawn = {figure.id for figure in FIGURES if set(FEW) & set(figure.measures)} | {"theorem"}
    assert figures == sorted(f"{name}.{kind}" for name in drawn for kind in ("pdf", "png", "txt"))
    for name in figures:
        one, two = ((tmp_path / folder / "figures" / name).read_bytes() for folder in ("one", "two"))
        assert one == two


def test_results_that_are_kept_without_their_arrays_make_a_page_that_says_so(tmp_path: Path) -> None:
    results, arrays = build_results()
    kept = of_measures(results, ["entropy", "sharpening"])
    (tmp_path / "results.json").write_text(json.dumps(kept.model_dump(mode="json")))
    page = write_report(tmp_path).read_text()
    assert "arrays.npz is not here" in page
    assert 'id="figure-attention-maps"' in page
    assert HOSTILE not in page
    write_results(tmp_path, kept, arrays)  # which states the digest of its arrays
    (tmp_path / "arrays.npz").unlink()
    with pytest.raises(DataError, match=r"arrays\.npz"):
        write_report(tmp_path)


def test_figures_of_an_earlier_analysis_do_not_stay_behind(tmp_path: Path) -> None:
    results, _ = build_results()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "own.png").write_bytes(b"")
    for measure, figure in (("eviction_cost", "eviction-cost"), ("usable_information", "usable-information")):
        alone = of_measures(results, [measure])
        write_results(tmp_path, alone.model_copy(update={"token_views": ()}), {})
        write_report(tmp_path)
        assert {path.stem for path in (tmp_path / "figures").iterdir()} == {figure, "own"}


def test_text_of_a_document_stays_text(page: str) -> None:
    assert HOSTILE not in page
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
    views = [json.loads(script) for script in scripts if script.startswith('{"arrays"')]
    assert HOSTILE in views[0]["tokens"]


def test_every_number_stands_in_a_table(page: str) -> None:
    results, _ = build_results()
    for record in results.records:
        if record.value is not None:
            assert format_estimate(record) in page
    assert "no pair of documents" in page
    for verdict in results.verdicts:
        assert verdict.claim in page
    assert "14% of the paper&#39;s" in page
    assert "Of 3 claims about what happens inside: 1 supported, 1 inconclusive, 1 not tested." in page


def test_every_coordinate_of_a_measure_is_explained_at_the_head_of_its_table(page: str) -> None:
    assert {axis for measure in MEASURES.values() for axis in measure.axes} <= AXES.keys()
    heads = re.findall(r'<th scope="col">(.*?)</th>', page.split("<main>")[1])
    plain = {head for head in heads if "<dfn" not in head}
    assert plain == {"measure", "Claim", "Paper", "Here, with 95% interval", "Verdict"}


def test_policies_of_a_cache_are_named_in_words_that_a_reader_knows() -> None:
    given, _ = build_results()
    policies = ("window", "meta", "slots", "even", "random", "heavy_hitters")
    records = tuple(
        Record(measure="eviction_cost", unit="nats/token", at={"policy": one, "kept": 0.2}, value=0.1, num_documents=9)
        for one in policies
    )
    text = render_page(given.model_copy(update={"records": records, "token_views": (), "verdicts": ()}), {})
    legend = re.findall(r"</span> ([^<]*)</li>", text)
    assert legend == [
        *("newest columns", "meta-tokens", "tokens before meta-tokens", "evenly spaced", "random", "most attended")
    ]
    assert ">share of the cache kept</text>" in text
    assert not {f"<td>{one}</td>" for one in ("meta", "slots", "even", "heavy_hitters")} & set(
        re.findall(r"<td>.*?</td>", text)
    )


def test_kept_analyses_are_told_apart_by_their_titles() -> None:
    kept = [json.loads(path.read_text()) for path in KEPT.glob("*/results.json")]
    assert len({one["title"] for one in kept}) == len(kept) > 1


def test_what_was_not_run_is_said_and_has_no_figure() -> None:
    results, arrays = build_results()
    others = [record.measure for record in results.records if record.measure != "eviction_cost"]
    one_of_each_part = {MEASURES[measure].part: measure for measure in reversed(others)}.values()
    text = render_page(of_measures(results, one_of_each_part), arrays)
    assert 'id="figure-eviction-cost"' not in text
    assert text.count('<p class="absent" id="absent">Not run: Meta-tokens as a cache.</p>') == 1


def test_each_record_of_measures_that_come_alone_is_on_the_page() -> None:
    results, _ = build_results()
    for measure in {record.measure for record in results.records}:
        alone = of_measures(results, [measure])
        text = render_page(alone.model_copy(update={"token_views": ()}), {})
        assert all(format_estimate(record) in text for record in alone.records)


def test_accuracies_are_drawn_beside_what_guesses_get_right() -> None:
    results, arrays = build_results()
    charts = {figure.id: figure for figure in FIGURES}
    capacity, accuracy = (charts[name].draw(results, arrays) for name in ("capacity", "accuracy"))
    (rule,) = capacity.panels[0].rules
    assert (rule.x, rule.y) == ([2, 4, 6, 8], pytest.approx([1 / 8, 1 / 16, 1 / 24, 1 / 32]))
    assert accuracy.panels[0].level == 0.07
    assert "Dashed: chance" in charts["capacity"].text_for(results)
    older = of_measures(results, {record.measure for record in results.records} - {"chance"})
    assert charts["capacity"].draw(older, arrays).panels[0].rules == []
    assert "Dashed" not in charts["capacity"].text_for(older)


def test_records_without_the_coordinates_of_their_plot_are_in_tables_alone() -> None:
    results, _ = build_results()
    names = ("excess_cosine", "meta_lift", "area")
    records = tuple(Record(measure=name, unit="1", value=0.5, num_documents=3) for name in names)
    alone = results.model_copy(update={"records": records, "token_views": ()})
    assert figure_files(alone, {}) == {}
    text = render_page(alone, {})
    assert text.count("<summary>Other numbers</summary>") == len(names)
    assert "<figure " not in text


def test_a_measure_of_another_version_is_shown_and_not_drawn() -> None:
    results, _ = build_results()
    record = Record(measure="of_another_version", unit="nats", value=0.123, num_documents=3)
    text = render_page(results.model_copy(update={"records": (record,), "token_views": ()}), {})
    assert 'id="other"' in text
    assert "<td>of another version</td><td>0.123 nats</td>" in text


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int16", "float32"])
def test_an_array_is_packed_small_and_comes_back(dtype: str) -> None:
    array = np.array([[0, 1], [5, 100]], dtype=dtype)
    if dtype == "float32":
        array[0, 0] = np.nan
    packed = page_module._pack_array(array.astype(float) if dtype == "float32" else array)
    data = np.frombuffer(gzip.decompress(base64.b64decode(packed["gzip"])), dtype=packed["dtype"])
    assert packed["dtype"] == dtype
    np.testing.assert_array_equal(data.reshape(packed["shape"]), array)


def test_documents_behind_the_maps_are_embedded_with_none_for_what_one_does_not_have() -> None:
    results, arrays = build_results()
    results = of_measures(results, ["sharpening", "log_odds_boost", "meta_mass"])
    text = render_page(results, arrays)
    (embedded,) = re.findall(r'id="documents">(.*?)</script>', text)
    behind = json.loads(embedded)
    assert sorted(behind) == ["log_odds_boost", "meta_mass", "sharpening"]
    for measure, one in behind.items():
        found = np.array(one["documents"], dtype=float)
        np.testing.assert_allclose(found, arrays[measure], atol=1e-5)
        assert np.isnan(found).any()
        assert len(one["cells"]) == len(results.find(measure))
    older = {name: array for name, array in arrays.items() if name not in behind}
    assert 'id="documents">{}</script>' in render_page(results, older)


def test_a_view_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "LARGEST_PAGE_BYTES", 100)
    results, arrays = build_results()
    text = render_page(of_measures(results, FEW[:1]), arrays)
    assert "token view of a hostile text: the page would be too large, see arrays.npz" in text
    assert 'id="token-view"' not in text


def test_the_whole_page_counts_and_not_its_views_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    results, arrays = build_results()
    results = of_measures(results, FEW[:1])
    whole = len(render_page(results, arrays).encode())
    for room, num_views in ((whole - 10, 1), (whole + 10_000, 2)):
        monkeypatch.setattr(page_module, "LARGEST_PAGE_BYTES", room)
        text = render_page(results, arrays)
        assert text.count('class="view-data"') == num_views
        assert len(text.encode()) <= room


def test_missing_results_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="write it anew with metatokens analyze"):
        write_report(tmp_path)
