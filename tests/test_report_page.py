"""The report's page as its reader meets it, in a real browser, and as text."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from src.report.charts import kind_and_block, ladder_bars, line_chart, round_ticks, tier_cells
from src.report.content import Report, Rung
from src.report.page import render, write_page

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from .helpers import missing
from .report_example import SCRIPT, example_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECTIONS = ("pictures", "ladder", "tiers", "errors", "costs", "settings")
WIPE = "getComputedStyle(document.querySelector('.wipe')).getPropertyValue('--wipe')"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        own = play.chromium.executable_path
        path = next(filter(None, map(shutil.which, BROWSERS)), own)
        if not Path(path).exists():
            missing(f"no browser ({', '.join(BROWSERS)}); tools/install_browser.sh gets one")
        # A sandbox needs rights that containers seldom give; the page is our own.
        launched = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a report's page; at the end nothing may have been complained of or asked for."""
    pages, complaints, requests = [], [], []

    def open_page(report: Report, width: int = 1200, **options: object):
        path = write_page(report, tmp_path / "index.html")
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not complaints
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len({url for url in requests if url.startswith("file:")}) == 1


@pytest.mark.slow
def test_every_part_is_there_and_every_picture_loads(visit):
    page = visit(example_report())
    for section in SECTIONS:
        assert page.locator(f"section#{section} h2").is_visible(), section
    assert page.locator(".pair").count() == 6
    assert page.locator(".ladder li").count() == 4
    assert page.locator(".chart .canvas").count() == 3
    widths = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert widths == [128] * 12
    heights = page.locator(".cells").evaluate_all("all => all.map(e => e.clientHeight)")
    assert len(heights) == 8 and min(heights) >= 14


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_is_wider_than_the_window_and_text_stays_legible(visit, width, scheme):
    page = visit(example_report(), width, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """[...document.querySelectorAll('body *')]
        .filter(e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    smallest = page.evaluate(
        """Math.min(...[...document.querySelectorAll('body *')].filter(e => e.innerText)
        .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 11
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = np.mean([int(n) for n in re.findall(r"\d+", background)[:3]])
    assert (shade < 60) if scheme == "dark" else (shade > 235)


def reference_share(page) -> float:
    """Share of the first picture that shows the 16-bit model's, which is all white."""
    shot = page.locator(".wipe").first.screenshot()
    row = np.asarray(Image.open(BytesIO(shot)).convert("L"))[-20]
    return float(np.mean(row > 200))


@pytest.mark.slow
def test_dragging_wipes_from_one_picture_to_the_other(visit):
    page = visit(example_report())
    assert reference_share(page) == pytest.approx(0.5, abs=0.03)
    box = page.locator(".wipe").first.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 40, steps=5)
    assert reference_share(page) == pytest.approx(0.8, abs=0.03)
    page.mouse.move(box["x"] - 50, box["y"] + 40)  # past the edge, the button still down
    assert reference_share(page) < 0.02
    page.mouse.up()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 40)
    assert reference_share(page) < 0.02


@pytest.mark.slow
def test_keys_and_screen_readers_use_a_real_slider(visit):
    page = visit(example_report())
    slider = page.get_by_role("slider").first
    assert SCRIPT in slider.get_attribute("aria-label")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.evaluate(WIPE) == "55%"
    assert slider.get_attribute("aria-valuetext").startswith("55 %")
    page.keyboard.press("End")
    assert reference_share(page) > 0.97
    page.keyboard.press("Home")
    assert reference_share(page) < 0.02


@pytest.mark.slow
def test_a_finger_moves_the_line(visit):
    page = visit(example_report(), 400, has_touch=True, is_mobile=True)
    wipe = page.locator(".wipe").first
    wipe.scroll_into_view_if_needed()
    box = wipe.bounding_box()
    page.touchscreen.tap(box["x"] + 0.25 * box["width"], box["y"] + 60)
    assert float(page.evaluate(WIPE).rstrip("%")) == pytest.approx(25, abs=1)


@pytest.mark.slow
def test_the_difference_of_equal_pictures_is_black(visit):
    report = example_report(1)
    pair = dataclasses.replace(report.pairs[0], quantized=report.pairs[0].reference)
    page = visit(dataclasses.replace(report, pairs=[pair]))
    assert reference_share(page) > 0.9
    page.get_by_label("difference").check()
    assert reference_share(page) == 0


@pytest.mark.slow
def test_what_a_prompt_says_is_shown_and_never_run(visit):
    hostile = f"{SCRIPT}<img src=x onerror=\"document.title='taken over'\">"
    report = example_report()
    pair = dataclasses.replace(report.pairs[0], prompt=hostile, figures={hostile: hostile})
    page = visit(
        Report(
            title=hostile,
            settings={hostile: hostile},
            notes=[hostile],
            pairs=[pair],
            ladder=[Rung(hostile, 1, 0, 2)],
            step_db={hostile: [1.0, 2.0]},
            sigmas=[1.0, 0.5],
            costs={hostile: {hostile: hostile}},
            highlights={hostile: hostile},
            summary={hostile: [hostile]},
            summary_columns=[hostile],
        )
    )
    assert page.title() == hostile
    assert page.locator(".pair figcaption p").inner_text() == hostile
    assert page.locator("script").count() == 1 and page.locator("img").count() == 2


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_a_large_model_and_a_long_word_stay_within_the_page(visit, width):
    report = example_report(1, 256)
    rng = np.random.default_rng(0)
    paths = [f"blocks.{i // 12}.image_transformer_block.mlp.{i % 12}" for i in range(285)]
    bits = rng.choice([4, 6, 8], (285, 28))
    tiers = dataclasses.replace(report.tiers, paths=paths, sigmas=list(range(28)), bits=bits)
    pair = dataclasses.replace(report.pairs[0], prompt="w" * 400)
    long = {"hash": "f" * 300}
    wide = {"seconds": {f"model number {i}": "0.123 s" for i in range(20)}}
    page = visit(
        dataclasses.replace(report, tiers=tiers, pairs=[pair], settings=long, costs=wide), width
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('*').length") < 1000


def test_parts_that_were_not_measured_are_left_out():
    text = render(Report(title="nothing", settings={}))
    assert "<h1>nothing</h1>" in text and "<section" not in text and "<h2" not in text
    some = render(Report(title="some", settings={}, ladder=[Rung("rtn", 3.0, 2.0, 4.0)]))
    assert re.findall(r'<section id="(\w+)"', some) == ["ladder"]


def test_the_page_is_one_file_and_the_same_each_time(tmp_path):
    one, two = (write_page(example_report(), tmp_path / f"{i}.html") for i in range(2))
    text = one.read_text()
    assert one.read_bytes() == two.read_bytes()
    assert not re.search(r'(src|href)="(?!data:)', text) and "url(" not in text
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["0.html", "1.html"]


def test_values_that_are_not_finite_leave_gaps():
    series = {"a": [1.0, float("inf"), 3.0, 4.0], "b": [float("nan")] * 4}
    chart = line_chart(series, range(4), "block")
    assert chart.lines[0].path.count("M") == 2 and chart.lines[1].path == ""
    assert line_chart({"b": [float("nan")]}, [0], "block") is None
    text = render(Report("t", {}, block_db=series, ladder=[Rung("same", *3 * [float("inf")])]))
    assert "nan%" not in text and "inf%" not in text and "equal" in text


def test_bars_start_at_zero_on_both_sides():
    up, down = ladder_bars([Rung("a", 6.0, 5.0, 8.0), Rung("b", -2.0, -2.0, -1.0)])
    assert up.start == pytest.approx(20) and up.start + up.width == pytest.approx(80)
    assert (down.start, down.start + down.width) == (pytest.approx(0), pytest.approx(20))
    assert up.low < up.start + up.width < up.high == 100


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_few_and_enclose_what_they_are_for(low, width):
    ticks = round_ticks(low, low + width)
    slack = 1e-6 * max(abs(low), width, 1e-9)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + slack and low + width <= ticks[-1] + slack
    assert all(b > a for a, b in zip(ticks, ticks[1:], strict=False))


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 12))
def test_cells_cover_every_input_and_step_once(seed, rows, steps):
    bits = np.random.default_rng(seed).choice([4, 6, 8], (rows, steps))
    drawn = np.zeros_like(bits)
    for tier, path in tier_cells(bits).items():
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            drawn[int(y), int(x) : int(x) + int(width)] += tier
    assert np.array_equal(drawn, bits)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("multimodal_transformer_blocks.3.image_transformer_block.mlp.fc2", ("image fc2", 3)),
        ("multimodal_transformer_blocks.0.text_transformer_block.attn.k_proj", ("text qkv", 0)),
        ("b.12.image_transformer_block.attn2.o_proj", ("image o_proj (second)", 12)),
    ],
)
def test_paths_are_named_by_stream_role_and_block(path, wanted):
    assert kind_and_block(path) == wanted
