"""Every chart is drawn once, and what is drawn follows from what a measure declares."""

import re
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed; `pip install -e '.[dev]'` brings it")

from metatokens.analysis.measures import MEASURES, Dots, HeadMaps, Lines, measure
from metatokens.analysis.results import Record
from metatokens.report import analysis_figures
from metatokens.report.analysis_figures import FIGURES, AnalysisFigure
from metatokens.report.charts import DotPanel, LinePanel, MapPanel, Mark, Series, Style, to_files, to_svg
from synthetic_results import NUM_HEADS, NUM_LAYERS, build_results

RESULTS, ARRAYS = build_results()
SVG = "{http://www.w3.org/2000/svg}"
LINE = Series("a", Style(0), [Mark(layer, 0.1 * layer, f"tip {layer}", 0, 1) for layer in range(4)])


def figure(name: str) -> AnalysisFigure:
    return next(one for one in FIGURES if one.id == name)


def test_every_measure_with_a_plot_has_one_figure() -> None:
    for name, one in MEASURES.items():
        if one.plot is not None:
            assert [figure.part for figure in FIGURES if name in figure.measures] == [one.part]


def test_a_new_measure_has_its_figure_without_an_edit_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metatokens.analysis.measures.MEASURES", registry := {})
    measure("causal", "bits", axes=("layer", "kind"), plot=Lines("layer", by="kind"))(new_measure)
    (declared,) = analysis_figures._declared(registry.values())
    assert (declared.id, declared.title, declared.part) == ("new-measure", "New measure", "causal")
    records = [
        Record(measure="new_measure", unit="bits", at={"layer": layer, "kind": kind}, value=1.0, num_documents=9)
        for layer in range(3)
        for kind in ("one", "other")
    ]
    chart = declared.draw(RESULTS.model_copy(update={"records": tuple(records)}), {})
    assert chart is not None
    (panel,) = chart.panels
    assert isinstance(panel, LinePanel)
    assert (panel.x_label, panel.y_label) == ("layer", "new measure, bits")
    assert [series.name for series in panel.series] == list(chart.legend) == ["one", "other"]


def new_measure(inputs: object) -> list[object]:
    """Nothing."""
    del inputs
    return []


def test_measures_that_are_drawn_alike_share_a_figure_of_one_unit() -> None:
    assert figure("row-sharpening").measures == ("row_sharpening", "row_sharpening_by_meta_logits")
    for one in FIGURES:
        plots = {MEASURES[name].plot for name in one.measures if MEASURES[name].plot}
        assert len(plots) < 2
        if HeadMaps() not in plots:
            assert len({MEASURES[name].unit for name in one.measures}) < 2


def test_a_coordinate_that_a_plot_does_not_name_has_panels_of_its_own() -> None:
    chart = figure("interchange-effect").draw(RESULTS, ARRAYS)
    assert chart is not None
    titles = ["denoise, window 1", "noise, window 1", "denoise, window 3", "noise, window 3"]
    assert [panel.title for panel in chart.panels] == titles
    records = [r for r in RESULTS.records if r.measure == "interchange_effect"]
    drawn = [mark for panel in chart.panels for series in panel.series for mark in series.marks]
    assert len(drawn) == len(records)


@pytest.mark.parametrize(
    ("measure", "plot", "joined"),
    [
        ("mass_by_distance", Lines("distance", by="to", panels="layer"), True),
        ("row_sharpening", Lines("layer"), False),
        ("row_sharpening", Dots("layer"), False),
    ],
)
def test_a_line_is_joined_but_not_over_layers(measure: str, plot: Lines | Dots, joined: bool) -> None:
    chart = analysis_figures._Plotted((measure,), plot)(RESULTS, ARRAYS)
    assert chart is not None
    assert chart.panels[0].joined == joined


@pytest.mark.parametrize("kind", [LinePanel, DotPanel])
def test_every_mark_of_a_panel_says_what_it_stands_for(kind: type) -> None:
    panel = LinePanel("p", [LINE], "layer", "y") if kind is LinePanel else DotPanel("p", [LINE], list("abcd"), "y")
    root = ET.fromstring(to_svg(panel, "the label"))
    assert [mark.get("data-tip") for mark in root.iter() if mark.get("data-tip")] == [f"tip {i}" for i in range(4)]
    assert (root.get("role"), root.get("aria-label")) == ("img", "the label")
    assert "from 0 to 0.3" in root.find(f"{SVG}desc").text
    assert "p" in [text.text for text in root.iter(f"{SVG}text")]  # text is text


def test_a_heat_map_has_a_cell_for_every_head_of_every_layer() -> None:
    chart = figure("attention-maps").draw(RESULTS, ARRAYS)
    assert chart is not None
    assert [panel.title for panel in chart.panels] == ["sharpening, nats", "log odds boost, nats", "meta mass"]
    panel = chart.panels[0]
    assert isinstance(panel, MapPanel)
    cells = [cell for cell in ET.fromstring(to_svg(panel, "map")).iter() if cell.get("data-layer")]
    assert len(cells) == NUM_LAYERS * NUM_HEADS
    (record,) = RESULTS.find("sharpening", layer=2, head=1)
    (cell,) = [one for one in cells if (one.get("data-layer"), one.get("data-head")) == ("2", "1")]
    assert f"{record.value:.3f} ({record.low:.3f} to {record.high:.3f}) nats" in cell.get("data-tip")


def test_colours_of_a_panel_are_those_of_the_page() -> None:
    black = Series("c", Style(6), LINE.marks)
    text = to_svg(
        LinePanel("p", [LINE, Series("b", Style(3, of_order=True), LINE.marks), black], "layer", "y"), "label"
    )
    assert {"var(--c0)", "var(--o3)", "var(--c6)", "currentColor"} <= set(
        re.findall(r"var\(--\w+\)|currentColor", text)
    )
    assert not re.search(r"#[0-9a-f]{6}", text)
    assert len(re.findall(r"fill: var\(--c6\)", text)) == len(re.findall(r"fill: var\(--c0\)", text))


def test_ids_of_two_panels_are_different() -> None:
    panels = [to_svg(LinePanel(name, [LINE], "layer", "y"), name) for name in ("one", "two")]
    one, two = (set(re.findall(r' id="(\w+)"', text)) for text in panels)
    assert one
    assert not one & two
    for text, ids in zip(panels, (one, two), strict=True):
        assert set(re.findall(r'href="#(\w+)"|url\(#(\w+)\)', text)) <= {
            pair for i in ids for pair in ((i, ""), ("", i))
        }


def test_the_curve_of_rate_and_distortion_is_the_lower_hull_of_its_points() -> None:
    chart = figure("rate-distortion").draw(RESULTS, ARRAYS)
    assert chart is not None
    (panel,) = chart.panels
    assert isinstance(panel, LinePanel)
    for series in panel.series:
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(series.path, series.path[1:], strict=False)]
        assert slopes == sorted(slopes)
        assert {mark.y for mark in series.marks} >= {y for _, y in series.path}
    assert len(panel.rules) == 1 + len(panel.series)


def test_a_figure_for_papers_is_the_same_for_the_same_chart() -> None:
    chart = figure("mass-by-distance").draw(RESULTS, ARRAYS)
    assert chart is not None
    files = to_files(chart)
    assert files == to_files(chart)
    assert files["png"].startswith(b"\x89PNG")
    assert files["pdf"].startswith(b"%PDF")
    assert b"Software" not in files["png"]
    assert b"CreationDate" not in files["pdf"]


def test_results_without_numbers_have_no_figure() -> None:
    nothing = RESULTS.model_copy(update={"records": (), "token_views": ()})
    assert [one.draw(nothing, {}) for one in FIGURES] == [None] * len(FIGURES)


@pytest.mark.parametrize(("last", "shown"), [(64, "0 1 2 4 8 16 32 64"), (128, "0 1 4 16 64")])
def test_the_powers_below_a_panel_do_not_run_into_each_other(last: int, shown: str) -> None:
    line = Series("a", Style(0), [Mark(distance, 1, "tip") for distance in (0, 1, last)])
    drawn = ET.fromstring(to_svg(LinePanel("p", [line], "distance", "", scale="log"), "label"))
    texts = [str(text.text) for text in drawn.iter(f"{SVG}text")]
    assert " ".join(texts[: texts.index("distance")]) == shown
