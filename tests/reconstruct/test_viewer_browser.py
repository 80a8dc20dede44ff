"""Report and viewer in a real browser: refocus, measure, 3-D, V-curves, wipe; the report from a file, as on a stick."""

from pathlib import Path

import pytest

from capture.stack import FocalStack
from reconstruct import infer, job, report, result
from tests.reconstruct import browser as real
from tests.reconstruct.small_stack import small_scene, write_small_stack
from tests.reconstruct.viewer_server import viewer

pytestmark = real.needs_chromium
DRAWN = "$('focus-value').textContent && $('threshold-value').textContent"  # both WebGL views have drawn


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Two results of one stack: at full size, and at half of it."""
    folder = tmp_path_factory.mktemp("out")
    stack = write_small_stack(folder.with_name("small.h5"), scene=small_scene(120, 160))
    with FocalStack.open(stack) as opened:
        overview = infer.read_overview(opened)
        for name, max_coc_px in (("fine", 40.0), ("coarse", 6.0)):
            answer = infer.reconstruct(opened, infer.Settings(device="cpu", max_coc_px=max_coc_px), overview=overview)
            answer.name = name
            answer.record["warnings"] = ["</script><script>document.title = 'broken'</script>", "<!--<script>"]
            result.save(answer, folder, report_html=report.render_report(answer, job._thumbnails(opened, overview)))
    return folder


def click(page, x_share, y_share):
    page.evaluate("$('refocus').scrollIntoView({ block: 'center' })")
    box = page.locator("#refocus").bounding_box()
    page.mouse.click(box["x"] + x_share * box["width"], box["y"] + y_share * box["height"])


def test_the_report_works_from_a_file(browser, out, artefacts):
    """Nothing but the file itself is read; clicking focuses and measures; every fact has its unit."""
    address = (out / "fine" / "report.html").as_uri()
    with real.screen(browser, address, artefacts) as shown:
        page = shown.page
        shown.wait(DRAWN)
        click(page, 0.5, 0.5)  # the square at 1 / 0.95 m
        at_square = page.inner_text("#focus-value")
        assert at_square.endswith(" m") and float(at_square.split()[0]) == pytest.approx(1 / 0.95, rel=0.05)
        assert "±" in page.inner_text("#readout")
        page.click("#measure")
        click(page, 0.1, 0.5)
        click(page, 0.5, 0.5)
        apart, error = page.inner_text("#measured").split(" apart ± ")
        assert apart.split()[1] in ("m", "cm") and float(error.split()[0]) > 0
        assert page.locator("#v-plot circle").count() > 8 and "px" in page.inner_text("#v-note")
        assert [e.inner_text() for e in page.query_selector_all("#maps b")][:3] == [
            "All-in-focus image",
            "Depth",
            "Confidence",
        ]
        shown.shot("report", ["laptop", "upright"])
        before = page.evaluate("$('solid').toDataURL().length")
        page.locator("#threshold").fill("100")
        assert page.evaluate("$('solid').toDataURL().length") < 0.7 * before  # unsure points are gone
        assert page.title() == "fine - daif"  # a warning is text, whatever it holds
        shown.asked_only(address)


def test_two_results_are_compared_with_a_wipe(browser, out, artefacts):
    with viewer(out) as url, real.screen(browser, url, artefacts) as shown:
        page = shown.page
        shown.wait("$('list').children.length === 2")
        inner = page.frame_locator("#report")
        inner.locator("#focus-value:not(:empty)").wait_for(timeout=60_000)
        assert inner.locator("#title").inner_text() == "coarse"
        page.click("#list button:has-text('fine')")
        shown.wait("$('report').src.includes('fine')")
        page.click("#compare")
        shown.wait("$('image-left').naturalWidth > 0 && !$('wipe').hidden")
        assert "median difference" in page.inner_text("#words") and " m" in page.inner_text("#words")
        shown.shot("wipe", ["laptop", "upright"])
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        assert page.get_attribute("#pair", "aria-valuenow") == "60"
        for what in ("aif", "confidence"):
            page.select_option("#map", what)
            shown.wait(f"$('words').textContent.includes('{'all-in' if what == 'aif' else 'sure'}')")
        shown.asked_only(url.partition("?")[0], "about:")


def test_the_result_that_was_asked_for_is_shown_first(browser, out, artefacts):
    with viewer(out / "fine") as url, real.screen(browser, url, artefacts) as shown:
        shown.wait("$('list').children.length === 2")
        inner = shown.page.frame_locator("#report")
        inner.locator("#focus-value:not(:empty)").wait_for(timeout=60_000)
        assert inner.locator("#title").inner_text() == "fine"
        assert [shown.page.input_value(side) for side in ("#left", "#right")] == ["fine", "coarse"]
