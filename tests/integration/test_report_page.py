"""The report in a real browser: no network, no errors, and what it shows is what Python computed."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metatokens.analysis.results import write_results
from metatokens.report.page import write_report
from synthetic_results import META_PLACES, NUM_HEADS, NUM_LAYERS, TOKENS, build_results

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium-headless-shell; install it to run these"),
    pytest.mark.xdist_group("browser"),
]
RESULTS, ARRAYS = build_results()
QUERY = len(TOKENS) - 1


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
            page.wait_for_selector("body[data-ready='1']")  # a string to evaluate would break the policy
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
    assert figures.count() == 10
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
    assert images.count() == 10
    assert all(image.is_visible() for image in images.all())
    assert page.locator("table.verdicts").is_visible()
    assert not page.locator("#token-view").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page: Any, scheme: str) -> None:
    page = open_page(scheme=scheme)

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = "getComputedStyle(document.documentElement).getPropertyValue"
    colours = {
        name: page.evaluate(f"{style}('--{name}').trim()")
        for name in ("ink", "soft", "accent", "good", "bad", "meta", "paper", "panel")
    }
    for background in ("paper", "panel"):
        for name in ("ink", "soft", "accent", "good", "bad", "meta"):
            bright, dim = sorted((luminance(colours[name]), luminance(colours[background])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (scheme, name, background)
