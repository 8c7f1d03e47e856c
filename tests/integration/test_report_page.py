"""The report in a real browser: no network, no errors, and what it shows is what Python computed."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from metatokens.analysis.results import Results, TokenView
from metatokens.report.analysis_figures import FIGURES
from metatokens.report.comparison import render_comparison
from metatokens.report.findings import hand_over_records
from metatokens.report.opening import opening_of
from metatokens.report.page import LARGEST_PAGE_BYTES, render_page
from synthetic_results import (
    META_PLACES,
    NUM_DOCUMENTS,
    NUM_HEADS,
    NUM_LAYERS,
    TOKENS,
    attention_of_documents,
    build_results,
)

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium-headless-shell; install it to run these"),
]
RESULTS, ARRAYS = build_results()
QUERY = len(TOKENS) - 1
SECONDS_TO_READY = 30  # 3 on an idle machine; a test machine may be busy
TOKEN_COLOURS = """[...document.querySelectorAll("#strip span")].map((span) => [
  getComputedStyle(document.body), getComputedStyle(span),
].map((style) => style.backgroundColor).concat(getComputedStyle(span).color))"""


TEXT_TOO_SMALL_OR_CLIPPED = """[...document.querySelectorAll("figure svg text")].filter((text) => {
  const svg = text.closest("svg"), frame = svg.getBoundingClientRect(), box = text.getBoundingClientRect();
  const size = parseFloat(getComputedStyle(text).fontSize) * frame.width / svg.viewBox.baseVal.width;
  return size < 12 || box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
}).map((text) => text.textContent)"""


def parse_colour(text: str) -> list[float]:
    channels = [float(number) for number in re.findall(r"[\d.]+", text)]
    return channels if len(channels) == 4 else [*channels, 1.0]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    def luminance(colour: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dim, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


def write_page(folder: Path, results: Results, arrays: dict[str, np.ndarray]) -> Path:
    (folder / "report.html").write_text(render_page(results, arrays), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module", name="browser")
def fixture_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", name="page_path")
def fixture_page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("report"), RESULTS, ARRAYS)


Pages = Callable[..., Any]


def open_in(browser: Any, path: Path, *, width: int, scheme: str, fragment: str = "", script: bool = True) -> Any:
    """Return the page in a window of its own; its problems and requests are noted."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
    )
    page = context.new_page()
    page.problems, page.requests = [], []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(path.as_uri() + fragment)
    if script:
        # not wait_for_function: to poll it evaluates a string, which the page's policy forbids
        page.wait_for_selector("body[data-ready='1']")
    return page


@pytest.fixture(name="open_page")
def fixture_open_page(browser: Any, page_path: Path) -> Iterator[Pages]:
    pages = []

    def open_page(*, width: int = 1400, scheme: str = "light", **options: Any) -> Any:
        pages.append(open_in(browser, page_path, width=width, scheme=scheme, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


@pytest.fixture(scope="module", name="standing_page")
def fixture_standing_page(browser: Any, page_path: Path) -> Pages:
    """Pages for tests that only look: a page takes a second to open, so those of one width and scheme share it."""

    pages: dict[tuple[int, str], Any] = {}

    def standing_page(*, width: int = 1400, scheme: str = "light") -> Any:
        if (width, scheme) not in pages:
            pages[width, scheme] = open_in(browser, page_path, width=width, scheme=scheme)
        return pages[width, scheme]

    return standing_page


FIGURES_AND_CHARTS = """figures => figures.map((figure) => [
  figure.ariaLabel, [...figure.querySelectorAll(".chart svg")].map((svg) => [
    svg.ariaLabel, svg.querySelector("desc").textContent, svg.getBoundingClientRect().width]),
])"""


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1400, "light")])
def test_page_loads_alone_without_errors_or_sideways_scroll(open_page: Pages, width: int, scheme: str) -> None:
    page = open_page(width=width, scheme=scheme)
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = [figure for figure in FIGURES if figure.draw(RESULTS, ARRAYS)]
    found = page.locator("figure[data-figure]").evaluate_all(FIGURES_AND_CHARTS)
    assert len(found) == len(drawn)
    for label, charts in found:
        assert label
        for name, description, wide in charts:
            assert name
            assert description
            assert 0 < wide <= width


def test_a_comparison_puts_models_of_one_seed_side_by_side_into_the_first_screen(browser: Any, tmp_path: Path) -> None:
    names = ("one/seed-0", "two/seed-0", "two/seed-1", "three/seed-0", "four/seed-0")
    analyses = [RESULTS.model_copy(update={"checkpoint": {"name": name, "sha256": name}}) for name in names]
    (tmp_path / "comparison.html").write_text(render_comparison(analyses), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto((tmp_path / "comparison.html").as_uri())
    places = [article.bounding_box() for article in page.locator("article").all()]
    one, two, three, four = (places[number] for number in (0, 1, 3, 4))
    assert one["y"] < two["y"] < three["y"]  # an arm of several seeds has rows of its own
    assert (places[2]["y"], four["y"]) == (two["y"], three["y"])
    assert one["x"] == two["x"] == three["x"]
    assert page.locator("article ol li").first.bounding_box()["y"] < 450
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()


def test_marks_are_as_many_as_records(standing_page: Any) -> None:
    page = standing_page()
    assert page.locator(CELLS).count() == 3 * NUM_LAYERS * NUM_HEADS
    assert page.locator("#figure-theorem use[data-tip]").count() == 300
    for measure in ("logit_difference", "eviction_cost", "cosine", "capacity"):
        marks = page.locator(f"#figure-{measure.replace('_', '-')} use[data-tip]")
        assert marks.count() == len(RESULTS.find(measure))


ORDER = """svg => [...svg.querySelectorAll("path, use")].map((mark) => (
  mark.classList.contains("chosen") ? "chosen" : mark.dataset.layer ? "cell" : mark.tagName
))"""
CELLS = "#figure-attention-maps .chart [data-layer]"
MEASURES = ("log_odds_boost", "meta_mass", "sharpening")  # by name


def cell_at(page: Any, layer: int, head: int) -> Any:
    return page.locator(f"{CELLS}[data-layer='{layer}'][data-head='{head}']").first


def test_the_pointer_on_a_cell_shows_its_number(open_page: Any) -> None:
    page = open_page()
    assert not page.locator("#hover").is_visible()
    cell_at(page, 0, 0).hover()  # the dot on it lets the pointer through
    record = RESULTS.find("sharpening", layer=0, head=0)[0]
    tip = page.locator("#hover").text_content()
    assert f"{record.value:.3f} ({record.low:.3f} to {record.high:.3f}) nats" in tip
    assert "layer: 0" in tip
    assert f"n = {NUM_DOCUMENTS}" in tip
    page.locator("h1").hover()
    assert not page.locator("#hover").is_visible()


@pytest.mark.parametrize("width", [360, 1400])
def test_the_pointer_near_a_mark_shows_its_number_within_the_window(standing_page: Any, width: int) -> None:
    page = standing_page(width=width)
    for measure in ("eviction_cost", "logit_difference", "knockout"):
        marks = page.locator(f"#figure-{measure.replace('_', '-')} use[data-tip]")
        mark = marks.nth(marks.count() - 1)
        mark.scroll_into_view_if_needed()
        box = mark.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2 + 1)
        assert page.locator("#hover").text_content() == mark.get_attribute("data-tip")
        shown = page.locator("#hover").bounding_box()
        assert shown["x"] >= 0
        assert shown["x"] + shown["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_of_charts_have_contrast(standing_page: Any, scheme: str) -> None:
    page = standing_page(scheme=scheme)
    panel = parse_colour(page.locator("figure").first.evaluate("node => getComputedStyle(node).backgroundColor"))
    fill = "nodes => [...new Set(nodes.map((node) => getComputedStyle(node).fill))]"
    texts = page.locator("#figure-eviction-cost svg text, #figure-attention-maps svg text").evaluate_all(fill)
    lines = page.locator("#figure-eviction-cost use[data-tip], #figure-cosine use[data-tip]").evaluate_all(fill)
    for colours, least in ((texts, 4.5), (lines, 3)):
        assert colours
        for colour in colours:
            assert contrast(parse_colour(colour)[:3], panel[:3]) >= least, (scheme, colour)


def check_documents_of(page: Any, layer: int, head: int) -> None:
    """Look whether the chosen cell's documents, means and frames are those of the results."""
    charts = page.locator(".cell .charts > div")
    assert charts.count() == len(MEASURES)
    for chart, measure in zip(charts.all(), MEASURES, strict=True):
        (record,) = RESULTS.find(measure, layer=layer, head=head)
        behind = ARRAYS[measure][:, layer, head]
        assert chart.locator("circle").count() == np.isfinite(behind).sum() == NUM_DOCUMENTS
        shown = re.search(r": (\S+) \((\S+) to (\S+)\)", chart.locator("p").text_content())
        found = [float(number) for number in shown.groups()]
        assert found == pytest.approx([record.value, record.low, record.high], abs=6e-4)
        assert f"layer {layer}, head {head}" in chart.locator("svg").get_attribute("aria-label")
    assert page.locator("#figure-attention-maps .chosen").count() == len(MEASURES)


@pytest.mark.parametrize("width", [360, 1400])
def test_a_click_on_a_cell_shows_the_documents_behind_it(open_page: Any, width: int) -> None:
    page = open_page(width=width, scheme="dark" if width == 360 else "light")
    assert page.locator(".cell .charts > div").count() == 0
    cell_at(page, 2, 1).click()
    check_documents_of(page, 2, 1)
    order = page.locator("#figure-attention-maps svg").first.evaluate(ORDER)
    assert "cell" not in order[order.index("chosen") :]
    assert "use" in order[order.index("chosen") :]  # its dot
    assert page.locator("#cell-layer").input_value() == "2"
    page.set_viewport_size({"width": width + 20, "height": 900})
    check_documents_of(page, 2, 1)
    page.locator("#cell-head").select_option("0")
    check_documents_of(page, 2, 0)
    page.locator("#cell-head").select_option("")
    assert page.locator(".chosen").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width + 20
    assert page.problems == []


def test_a_dot_stands_at_its_document_and_its_number(open_page: Any) -> None:
    page = open_page()
    for key in ("layer", "head"):
        page.locator(f"#cell-{key}").select_option("1")
    dots = page.locator(".cell .charts > div").first.locator("circle")
    behind = ARRAYS[MEASURES[0]][:, 1, 1]
    places = []
    for dot in (dots.nth(4), dots.nth(0), dots.nth(20)):
        dot.hover(force=True)
        named, shown = re.fullmatch(r"document (\d+)\n(\S+) nats", page.locator("#hover").text_content()).groups()
        assert float(shown) == pytest.approx(behind[int(named)], rel=1e-3, abs=1e-5)
        places.append((float(shown), float(dot.get_attribute("cx"))))
    (a, at_a), (b, at_b), (c, at_c) = places
    assert (at_b - at_a) / (at_c - at_a) == pytest.approx((b - a) / (c - a), rel=0.01)


def test_a_cell_leads_to_the_tokens_of_its_head(open_page: Any) -> None:
    page = open_page()
    page.locator("#view-quantity").select_option("loss")
    page.locator("#cell-layer").select_option("3")
    page.locator("#cell-head").select_option("2")
    page.locator(".cell a").click()
    page.wait_for_selector("#heads button[data-layer='3'][data-head='2'][aria-pressed=true]")
    assert page.locator("#view-quantity").input_value() == "attention"
    assert (page.locator("#view-layer").input_value(), page.locator("#view-head").input_value()) == ("3", "2")
    assert page.locator("#tokens").evaluate("node => node.getBoundingClientRect().top") < 400


def test_results_without_numbers_of_documents_have_a_page_as_before(browser: Any, tmp_path: Path) -> None:
    older = {name: array for name, array in ARRAYS.items() if name not in attention_of_documents()}
    page = browser.new_page()
    page.goto(write_page(tmp_path, RESULTS, older).as_uri())
    page.wait_for_selector("body[data-ready='1']")
    assert page.locator(CELLS).count() == 3 * NUM_LAYERS * NUM_HEADS
    assert page.locator(".cell").count() == 0
    page.close()


def attention(layer: int, head: int, query: int, key: int) -> float:
    return float((ARRAYS["view0_attention"][layer, head, query, key] / 255) ** 2)


def test_hovering_a_token_shows_the_number_that_python_computed(open_page: Any) -> None:
    page = open_page()
    page.locator("#view-layer").select_option("2")
    page.locator("#view-head").select_option("1")
    page.locator(f"#token-{QUERY}").hover()
    weights = np.array([attention(2, 1, QUERY, key) for key in range(len(TOKENS))])
    assert weights.sum() == pytest.approx(1, abs=0.02)
    best = int(weights.argmax())
    tip = page.locator("#tip").text_content()
    assert f"at {QUERY}. " in tip
    shown = float(tip.split(f"at {best}: ")[1].split(",")[0])
    assert shown == pytest.approx(weights[best], abs=0.004)
    original = ARRAYS["view0_attention"][2, 1, QUERY, best]
    assert shown == pytest.approx((original / 255) ** 2, abs=0.0006)


def test_keys_show_what_the_pointer_shows_and_clicks_pin(open_page: Any) -> None:
    page = open_page()
    page.locator("#token-5").hover()
    by_pointer = page.locator("#tip").text_content()
    page.mouse.move(0, 0)
    page.locator("#token-4").hover()
    page.locator("#strip").focus()
    page.mouse.move(0, 0)
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").text_content() == by_pointer
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    assert "of pinned" in page.locator("#tip").text_content()
    page.keyboard.press("Escape")
    assert "of pinned" not in page.locator("#tip").text_content()


def test_every_quantity_and_the_address_work(open_page: Any) -> None:
    page = open_page(fragment="#quantity=meta_attention&layer=1&head=mean&query=8")
    assert page.locator("#view-quantity").input_value() == "meta_attention"
    meta = META_PLACES.index(8)
    assert f"meta-token {meta + 1} at 8. " in page.locator("#tip").text_content()
    assert "meta-token 1 at 3: 0.498" in page.locator("#tip").text_content()
    page.locator("#view-quantity").select_option("loss")
    assert ": 0.100" in page.locator("#tip").text_content()
    page.locator("#view-quantity").select_option("received")
    assert "query=8" in page.url
    page.locator("#view-meta").uncheck()
    assert not page.locator("#token-3").is_visible()
    page.locator("#heads button").nth(4).click()
    assert page.locator("#view-layer").input_value() == "1"
    assert page.problems == []


def test_a_token_shows_what_a_branch_adds_to_its_logit(open_page: Pages) -> None:
    page = open_page()
    for quantity in ("logit_attention", "logit_meta_attention", "logit_mlp"):
        check_logits_of(page, quantity)


def check_logits_of(page: Any, quantity: str) -> None:
    page.locator("#view-quantity").select_option(quantity)
    page.locator("#view-layer").select_option("2")
    assert page.locator("#view-head").is_disabled()
    page.locator("#token-5").hover()
    shown = re.search(r"at 5\. Here (\S+) logits of (\S+) in all", page.locator("#tip").text_content())
    expected = [ARRAYS[f"view0_{quantity}"][2, 5], ARRAYS["view0_logit"][5]]
    assert [float(number) for number in shown.groups()] == pytest.approx(expected, abs=6e-4)
    page.locator("#token-3").hover()  # a meta-token has no logit
    assert "at 3. Here n/a." in page.locator("#tip").text_content()
    page.locator("#view-quantity").select_option("loss")
    assert page.locator("#view-layer").is_disabled()
    page.locator("#view-quantity").select_option("attention")
    assert page.locator("#view-head").is_enabled()


def test_patch_effects_have_a_layer_more_than_the_model(open_page: Any) -> None:
    page = open_page(fragment=f"#quantity=patch_effect&layer={NUM_LAYERS}&query=7")
    effects = ARRAYS["view0_patch_effect"]
    assert page.locator("#view-layer option").count() == NUM_LAYERS + 1
    assert page.locator("#view-layer").input_value() == str(NUM_LAYERS)
    assert f"at 7. Here {effects[NUM_LAYERS, 7]:.3f}." in page.locator("#tip").text_content()
    page.locator("#view-layer").select_option("0")
    page.locator("#token-9").hover()
    assert f"at 9. Here {effects[0, 9]:.3f}." in page.locator("#tip").text_content()
    page.locator("#view-layer").select_option(str(NUM_LAYERS))
    page.locator("#view-quantity").select_option("attention")
    assert page.locator("#view-layer").input_value() == str(NUM_LAYERS - 1)
    assert page.problems == []


def long_attention(layer: int, plane: int, query: int) -> dict[int, float]:
    keys, weights = (ARRAYS[f"view1.attention_{name}"][layer, plane, query] for name in ("keys", "weights"))
    return {int(key): (int(weight) / 255) ** 2 for key, weight in zip(keys, weights, strict=True) if weight}


def test_a_long_text_shows_the_weights_that_were_kept(open_page: Pages) -> None:
    page = open_page(fragment="#text=1")
    assert page.locator("#view-head option").all_text_contents() == ["mean", "2", "3", "4"]
    assert "its 8 largest weights" in page.locator("#view-note").text_content()
    assert "3 heads a layer" in page.locator("#view-note").text_content()
    page.locator("#view-layer").select_option("3")
    for (head, plane), query in product((("2", 1), ("4", 3), ("mean", 0)), (250, 4)):
        page.locator("#view-head").select_option(head)
        page.locator(f"#token-{query}").hover()
        tip = page.locator("#tip").text_content()
        shown = {int(key): float(value) for key, value in re.findall(r" at (\d+): (\d\.\d+)", tip)}
        kept = long_attention(3, plane, query)
        assert len(shown) == 4
        assert shown == pytest.approx({key: kept[key] for key in shown}, abs=0.004)
        assert min(shown.values()) >= sorted(kept.values())[-4] - 0.004
    page.locator("#token-250").click()
    page.locator("#token-200").click()
    if 200 not in long_attention(3, 0, 250):
        assert page.locator("#tip").text_content().endswith("from 250 to 200: n/a")
    assert page.problems == []


def test_a_long_text_has_a_matrix_thumbnails_and_what_is_measured_of_all_its_heads(open_page: Any) -> None:
    page = open_page(fragment="#text=1&quantity=received&layer=1&head=0&query=20")
    assert page.locator("#view-head option").count() == 1 + 5
    expected = ARRAYS["view1.received_attention"][1, 0, 20]
    assert f"at 20. Here {expected:.4f}." in page.locator("#tip").text_content()
    assert page.locator("#heads button").count() == 3 * NUM_LAYERS
    page.locator("#heads button").nth(4).click()
    assert (page.locator("#view-layer").input_value(), page.locator("#view-head").input_value()) == ("1", "3")
    assert page.locator("#matrix-caption").text_content().startswith("Attention, layer 1, head 3")
    for canvas in ("document.getElementById('matrix')", "document.querySelectorAll('#heads canvas')[4]"):
        painted = page.evaluate(
            f"(() => {{ const c = {canvas}; return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
            ".filter((x, i) => i % 4 === 3 && x > 0).length; })()"
        )
        assert painted > 200
    page.locator("#view-text").select_option("0")
    assert page.locator("#view-head option").count() == 1 + NUM_HEADS
    assert page.problems == []


@pytest.mark.parametrize(("text", "width"), [(0, 1400), (0, 360), (1, 360)])
def test_no_quantity_of_a_text_is_wider_than_the_window(open_page: Any, text: int, width: int) -> None:
    page = open_page(width=width, fragment=f"#text={text}&query=9")
    quantities = page.locator("#view-quantity option").evaluate_all("nodes => nodes.map((node) => node.value)")
    assert len(quantities) == (10 if text == 0 else 3)
    for quantity in quantities:
        page.locator("#view-quantity").select_option(quantity)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert " at 9. " in page.locator("#tip").text_content()
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_dots_stand_at_their_numbers(standing_page: Any) -> None:
    dots = standing_page().locator("#figure-logit-difference use[data-tip]")
    places = [float(dot.get_attribute("x")) for dot in dots.all()]
    values = [record.value for record in RESULTS.find("logit_difference")]
    steps = [(place - places[0]) / (value - values[0]) for place, value in zip(places[1:], values[1:], strict=True)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_cosines_keep_their_sign(open_page: Any, sign: int) -> None:
    quantity = "cosine_raw" if sign > 0 else "cosine_centred"
    page = open_page(fragment=f"#quantity={quantity}&layer=2&query={QUERY}")
    cosines = ARRAYS["view0_cosine_raw"][2, QUERY] / 127
    best = int(np.abs(cosines).argmax())
    assert f"at {best}: {sign * cosines[best]:.3f}" in page.locator("#tip").text_content()


@pytest.mark.parametrize(
    "fragment",
    [
        "#text=0.5&quantity=x&layer=99&head=7&query=-3",
        "#text=9&head=__proto__&query=1.5",
        "#query=99",
    ],
)
def test_an_address_of_nothing_falls_back(open_page: Any, fragment: str) -> None:
    page = open_page(fragment=fragment)
    assert page.problems == []
    assert f" at {QUERY}. " in page.locator("#tip").text_content()
    opened = opening_of(RESULTS.token_views[0], ARRAYS)
    assert page.locator("#view-layer").input_value() in ("0", str(opened["layer"]))
    assert page.locator("#view-head").input_value() in ("mean", opened["head"])


def test_an_address_holds_the_whole_state(open_page: Any) -> None:
    page = open_page()
    page.locator("#view-layer").select_option("1")
    page.locator("#token-4").click()
    page.locator("#token-9").click()
    shown = page.locator("#tip").text_content()
    fragment = "#" + page.url.split("#")[1]
    other = open_page(fragment=fragment)
    assert other.locator("#tip").text_content() == shown
    other.evaluate("location.hash = '#layer=2&query=6'")
    other.wait_for_selector("#token-6.query")
    assert other.locator("#view-layer").input_value() == "2"


def test_a_second_click_compares_the_same_keys(open_page: Any) -> None:
    page = open_page(fragment="#layer=3&head=2")
    page.locator("#token-13").click()
    page.locator("#token-9").click()
    weights = [attention(3, 2, 9, key) for key in range(10)]
    best = sorted(range(10), key=lambda key: -weights[key])[:4]
    of_pinned = ", ".join(f"{attention(3, 2, 13, key):.3f}" for key in best)
    tip = page.locator("#tip").text_content()
    assert tip.endswith(f"at 13: {of_pinned}; from 13 to 9: {attention(3, 2, 13, 9):.3f}")
    page.locator("#token-2").hover()
    assert page.locator("#tip").text_content() == tip


@pytest.mark.parametrize("quantity", ["attention", "meta_attention"])
def test_a_row_of_the_matrix_is_the_query_under_the_pointer(open_page: Any, quantity: str) -> None:
    page = open_page(fragment=f"#quantity={quantity}")
    places = META_PLACES if quantity == "meta_attention" else range(len(TOKENS))
    matrix = page.locator("#matrix")
    matrix.scroll_into_view_if_needed()
    box = matrix.bounding_box()
    for row, place in enumerate(places):
        matrix.hover(position={"x": 5, "y": box["height"] * (row + 0.5) / len(places)})
        assert f" at {place}. " in page.locator("#tip").text_content()


def test_heads_are_one_stop_of_the_keyboard(open_page: Any) -> None:
    page = open_page(fragment="#layer=1&head=1")
    assert page.locator("#heads button[tabindex='0']").count() == 1
    page.locator("#heads button[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    assert (page.locator("#view-layer").input_value(), page.locator("#view-head").input_value()) == ("2", "1")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#view-head").input_value() == "0"
    assert page.evaluate("document.activeElement.ariaLabel") == "layer 2, head 0"


def test_downloaded_results_are_the_results(standing_page: Any) -> None:
    page = standing_page()
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "results.json"
    assert json.loads(Path(download.value.path()).read_text()) == RESULTS.model_dump(mode="json")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_stay_readable_on_their_shades(open_page: Any, scheme: str) -> None:
    page = open_page(scheme=scheme)
    darkest = dict.fromkeys((True, False), 0.0)
    for quantity, query in product(("attention", "meta_attention", "cosine_raw", "loss"), (8, 9)):
        page.locator("#view-quantity").select_option(quantity)
        page.locator(f"#token-{query}").hover()
        for index, found in enumerate(page.evaluate(TOKEN_COLOURS)):
            paper, shade, ink = (parse_colour(colour) for colour in found)
            mixed = [shade[3] * over + (1 - shade[3]) * under for over, under in zip(shade[:3], paper[:3], strict=True)]
            assert contrast(mixed, ink[:3]) >= 4.5, (scheme, quantity, found)
            is_meta = index in META_PLACES
            darkest[is_meta] = max(darkest[is_meta], shade[3])
    assert darkest == dict.fromkeys(darkest, 0.55)  # the mark of a meta-token was seen on the darkest shade, too
    small = page.locator("#strip span").evaluate_all(
        "all => all.filter((one) => parseFloat(getComputedStyle(one).fontSize) < 12)"
    )
    assert not small


def test_the_largest_view_is_ready_in_time(browser: Any, tmp_path: Path) -> None:
    count, shape = 256, (12, 12, 256, 256)
    generator = np.random.Generator(np.random.PCG64(2))
    attention_steps = np.tril(generator.integers(0, 40, shape, dtype=np.uint8))
    tokens, is_meta = tuple(f" w{i}" for i in range(count)), tuple(i % 10 == 9 for i in range(count))
    view = TokenView(title="long", tokens=tokens, is_meta=is_meta, arrays={"attention": "long"})
    results = RESULTS.model_copy(update={"token_views": (view,)})
    path = write_page(tmp_path, results, ARRAYS | {"long": attention_steps})
    assert path.stat().st_size < LARGEST_PAGE_BYTES
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready='1']")
    assert page.locator("#token-255").count() == 1
    assert page.evaluate("performance.now()") < SECONDS_TO_READY * 1000
    page.close()


def test_matrix_is_drawn(standing_page: Any) -> None:
    page = standing_page()
    painted = page.evaluate(
        "[...document.getElementById('matrix').getContext('2d').getImageData(0, 0, 512, 512).data]"
        ".filter((x, i) => i % 4 === 3 && x > 0).length"
    )
    assert painted > 512 * 512 / 3


def test_the_page_opens_at_the_answer_in_the_head_that_reads_most_from_meta_tokens(open_page: Any) -> None:
    page, opened = open_page(), opening_of(RESULTS.token_views[0], ARRAYS)
    assert page.locator("#strip .query").get_attribute("data-index") == str(opened["query"])
    assert page.locator("#view-layer").input_value() == str(opened["layer"])
    assert page.locator("#view-head").input_value() == opened["head"]


@pytest.mark.parametrize("width", [360, 1400])
def test_text_of_charts_is_12_pixels_high_and_not_clipped(standing_page: Any, width: int) -> None:
    page = standing_page(width=width)
    assert page.evaluate(TEXT_TOO_SMALL_OR_CLIPPED) == []


def test_a_figure_is_downloaded_as_svg_and_its_numbers_as_csv(standing_page: Any) -> None:
    page = standing_page()
    texts = {}
    for kind in ("SVG", "CSV"):
        with page.expect_download() as download:
            page.locator("#figure-hand-over .downloads button", has_text=kind).click()
        texts[kind] = Path(download.value.path()).read_text(encoding="utf-8")
    ET.fromstring(texts["SVG"])
    assert "var(--" not in texts["SVG"]
    rows = list(csv.reader(texts["CSV"].splitlines()))
    assert rows[0][-4:] == ["value (95% interval)", "n", "adjusted p", "note"]
    assert len(rows) == 1 + len(hand_over_records(RESULTS, "denoise"))


def test_markup_in_a_text_is_shown_and_not_obeyed(standing_page: Any) -> None:
    page = standing_page()
    assert page.locator("#injected").count() == 0
    assert "</script><b id='injected'>x" in page.locator("#strip").text_content()


def test_without_javascript_charts_and_tables_are_there(open_page: Any) -> None:
    page = open_page(script=False)
    charts = page.locator("figure .chart")
    assert charts.count() == sum(figure.draw(RESULTS, ARRAYS) is not None for figure in FIGURES)
    assert all(chart.locator("svg").first.is_visible() for chart in charts.all())
    assert page.locator("table.verdicts").first.is_visible()
    assert not page.locator("#token-view").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(standing_page: Any, scheme: str) -> None:
    page = standing_page(scheme=scheme)

    style = "getComputedStyle(document.documentElement).getPropertyValue"
    colours = {
        name: page.evaluate(f"{style}('--{name}').trim()")
        for name in ("ink", "soft", "accent", "good", "bad", "meta", "paper", "panel")
    }
    for background in ("paper", "panel"):
        for name in ("ink", "soft", "accent", "good", "bad", "meta"):
            one, other = ([int(colours[key][i : i + 2], 16) for i in (1, 3, 5)] for key in (name, background))
            assert contrast(one, other) >= 4.5, (scheme, name, background)
