"""The report in a real browser: no network, no errors, and what it shows is what Python computed."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metatokens.analysis.results import TokenView, write_results
from metatokens.report.analysis_figures import FIGURES
from metatokens.report.page import LARGEST_PAGE_BYTES, write_report
from synthetic_results import META_PLACES, NUM_HEADS, NUM_LAYERS, TOKENS, build_results

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium-headless-shell; install it to run these"),
    pytest.mark.xdist_group("browser"),
]
RESULTS, ARRAYS = build_results()
QUERY = len(TOKENS) - 1
SECONDS_TO_READY = 30  # 3 on an idle machine; a test machine may be busy
TOKEN_COLOURS = """[...document.querySelectorAll("#strip span")].map((span) => [
  getComputedStyle(document.body), getComputedStyle(span),
].map((style) => style.backgroundColor).concat(getComputedStyle(span).color))"""


def parse_colour(text: str) -> list[float]:
    channels = [float(number) for number in re.findall(r"[\d.]+", text)]
    return channels if len(channels) == 4 else [*channels, 1.0]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    def luminance(colour: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dim, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


@pytest.fixture(scope="module", name="browser")
def fixture_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", name="page_path")
def fixture_page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_results(folder, RESULTS, ARRAYS)
    return write_report(folder)


@pytest.fixture(name="open_page")
def fixture_open_page(browser: Any, page_path: Path) -> Iterator[Any]:
    contexts = []

    def open_page(*, width: int = 1400, scheme: str = "light", fragment: str = "", script: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.problems, page.requests = [], []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(page_path.as_uri() + fragment)
        if script:
            # not wait_for_function: to poll it evaluates a string, which the page's policy forbids
            page.wait_for_selector("body[data-ready='1']")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_page_loads_alone_without_errors_or_sideways_scroll(open_page: Any, width: int, scheme: str) -> None:
    page = open_page(width=width, scheme=scheme)
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    figures = page.locator("figure[data-figure]")
    assert figures.count() == len(FIGURES)
    for figure in figures.all():
        assert figure.get_attribute("aria-label")
        assert figure.locator(".chart svg").count() > 0


def test_marks_are_as_many_as_records_and_tips_show_their_numbers(open_page: Any) -> None:
    page = open_page()
    maps = page.locator("#figure-attention-maps .chart")
    assert maps.locator("g[aria-label=cell] rect").count() == 3 * NUM_LAYERS * NUM_HEADS
    assert page.locator("#figure-theorem g[aria-label=dot] circle").count() == 300
    assert page.locator("#figure-two-by-two g[aria-label=bar] rect").count() == 4
    cell = maps.locator("svg:has(g[aria-label=cell])").first.locator("g[aria-label=cell] rect").first
    cell.hover(force=True)  # a dot lies on it
    record = RESULTS.find("attention", "entropy_drop", layer=0, head=0)[0]
    tip = maps.locator("g[aria-label=tip]").first.text_content()
    assert record.value is not None
    assert f"{record.value:.3f}" in tip


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


def test_bars_are_as_long_as_their_numbers(open_page: Any) -> None:
    bars = open_page().locator("#figure-two-by-two g[aria-label=bar] rect")
    lengths = [float(bar.get_attribute("width")) for bar in bars.all()]
    values = [record.value for record in RESULTS.find("causal", "logit_difference")]
    assert [length / lengths[0] for length in lengths] == pytest.approx([value / values[0] for value in values])


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
        "#layer=99",
        "#head=7",
        "#head=__proto__",
        "#text=0.5",
        "#text=9",
        "#query=-3",
        "#query=1.5",
        "#query=99",
        "#quantity=x",
    ],
)
def test_an_address_of_nothing_falls_back(open_page: Any, fragment: str) -> None:
    page = open_page(fragment=fragment)
    assert page.problems == []
    place = QUERY if fragment == "#query=99" else 0
    assert f" at {place}. " in page.locator("#tip").text_content()
    assert page.locator("#view-layer").input_value() == "0"
    assert page.locator("#view-head").input_value() == "mean"


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


def test_downloaded_results_are_the_results(open_page: Any) -> None:
    page = open_page()
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "results.json"
    assert json.loads(Path(download.value.path()).read_text()) == RESULTS.model_dump(mode="json")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_stay_readable_on_their_shades(open_page: Any, scheme: str) -> None:
    page = open_page(scheme=scheme)
    for fragment in ("attention", "cosine_raw", "loss"):
        page.evaluate(f"location.hash = '#quantity={fragment}&layer=1&query=9'")
        page.wait_for_selector("#token-9.query")
        page.locator("#view-quantity").select_option(fragment)
        for found in page.evaluate(TOKEN_COLOURS):
            channels = [parse_colour(colour) for colour in found]
            paper, shade, ink = channels
            mixed = [shade[3] * over + (1 - shade[3]) * under for over, under in zip(shade[:3], paper[:3], strict=True)]
            assert contrast(mixed, ink[:3]) >= 4.5, (scheme, fragment, found)


def test_the_largest_view_is_ready_in_time(browser: Any, tmp_path: Path) -> None:
    count, shape = 256, (12, 12, 256, 256)
    generator = np.random.Generator(np.random.PCG64(2))
    attention_steps = np.tril(generator.integers(0, 40, shape, dtype=np.uint8))
    tokens, is_meta = tuple(f" w{i}" for i in range(count)), tuple(i % 10 == 9 for i in range(count))
    view = TokenView(title="long", tokens=tokens, is_meta=is_meta, arrays={"attention": "long"})
    write_results(tmp_path, RESULTS.model_copy(update={"token_views": (view,)}), ARRAYS | {"long": attention_steps})
    path = write_report(tmp_path)
    assert path.stat().st_size < LARGEST_PAGE_BYTES + 2_000_000
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready='1']")
    assert page.locator("#token-255").count() == 1
    assert page.evaluate("performance.now()") < SECONDS_TO_READY * 1000
    page.close()


def test_matrix_is_drawn(open_page: Any) -> None:
    page = open_page()
    painted = page.evaluate(
        "[...document.getElementById('matrix').getContext('2d').getImageData(0, 0, 512, 512).data]"
        ".filter((x, i) => i % 4 === 3 && x > 0).length"
    )
    assert painted > 512 * 512 / 3


def test_markup_in_a_text_is_shown_and_not_obeyed(open_page: Any) -> None:
    page = open_page()
    assert page.locator("#injected").count() == 0
    assert "</script><b id='injected'>x" in page.locator("#strip").text_content()


def test_without_javascript_images_and_tables_tell_the_same(open_page: Any) -> None:
    page = open_page(script=False)
    images = page.locator("figure noscript img")
    assert images.count() == len(FIGURES)
    assert all(image.is_visible() for image in images.all())
    assert page.locator("table.verdicts").is_visible()
    assert not page.locator("#token-view").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page: Any, scheme: str) -> None:
    page = open_page(scheme=scheme)

    style = "getComputedStyle(document.documentElement).getPropertyValue"
    colours = {
        name: page.evaluate(f"{style}('--{name}').trim()")
        for name in ("ink", "soft", "accent", "good", "bad", "meta", "paper", "panel")
    }
    for background in ("paper", "panel"):
        for name in ("ink", "soft", "accent", "good", "bad", "meta"):
            one, other = ([int(colours[key][i : i + 2], 16) for i in (1, 3, 5)] for key in (name, background))
            assert contrast(one, other) >= 4.5, (scheme, name, background)
