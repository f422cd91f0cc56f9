"""The live report in headless Chromium, of a sweep whose records grow: place, order and hidden curves stay."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit" / "page"))

from growing import Growing, served

pytestmark = pytest.mark.slow


def test_the_open_page_follows_the_sweep_and_keeps_what_its_reader_has_set(browser: Any, tmp_path: Path) -> None:
    sweep, faults = Growing(tmp_path, 30), list[str]()
    sweep.grow(24)
    with served(sweep.paths) as address:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address, wait_until="commit")
        page.wait_for_function("document.body?.dataset.ready === 'yes'", timeout=120_000)
        assert page.locator(".state").first.inner_text().startswith("24 of 30 trials ended")

        head = page.locator("#leaders-0 th", has_text="tokens/s").locator("button")
        head.click()
        head.click()
        page.locator("button.more").click()
        page.locator("details summary").click()
        curves = page.locator("#plot-0-curves")
        curves.scroll_into_view_if_needed()
        page.locator("#plot-0-curves[data-drawn=yes]").wait_for(timeout=120_000)
        curves.locator(".updatemenu-button", has_text="tokens").click()
        hidden = page.evaluate(
            "(() => { const e = document.getElementById('plot-0-curves'); const i = e.data.length - 2;"
            " Plotly.restyle(e, {visible: 'legendonly'}, [i]); return e.data[i].name; })()"
        )
        page.evaluate("window.scrollBy(0, 40)")
        top = curves.bounding_box()["y"]

        sweep.grow(30)
        page.wait_for_function("Number(document.body.dataset.updates ?? 0) >= 1", timeout=120_000)
        page.wait_for_function("document.getElementById('live').textContent.startsWith('The sweep has ended')")

        assert page.locator(".state").first.inner_text().startswith("30 of 30 trials ended")
        assert abs(curves.bounding_box()["y"] - top) < 2
        assert page.locator("#leaders-0 tbody tr:visible").count() == 30
        sorted_by = page.locator("#leaders-0 th[aria-sort=descending]")
        assert sorted_by.inner_text() == "tokens/s"
        column = page.evaluate(
            "[...document.querySelectorAll('#leaders-0 tbody tr')].map((row) =>"
            " +row.cells[document.querySelector('#leaders-0 th[aria-sort]').cellIndex].dataset.key)"
        )
        assert column == sorted(column, reverse=True)
        assert page.locator("details").get_attribute("open") is not None
        drawn = "document.getElementById('plot-0-curves')"
        assert page.evaluate(f"{drawn}.data.filter((t) => t.visible === 'legendonly').map((t) => t.name)") == [hidden]
        assert page.evaluate(f"Math.max(...{drawn}.data.flatMap((t) => t.x))") == 20_000  # tokens, not steps
        assert page.evaluate(f"{drawn}.data.find((t) => /others/.test(t.name)).name") == "22 others"
        page.locator("#plot-0-machines").scroll_into_view_if_needed()
        page.locator("#plot-0-machines[data-drawn=yes]").wait_for(timeout=120_000)
        if shots := os.environ.get("REPORT_SCREENSHOTS"):
            page.screenshot(path=Path(shots) / "live.png")
    assert faults == []


def test_a_page_whose_server_has_ended_says_so(browser: Any, tmp_path: Path) -> None:
    sweep = Growing(tmp_path, 3)
    sweep.grow(1)
    with served(sweep.paths) as address:
        page = browser.new_context().new_page()
        page.goto(address, wait_until="commit")
        page.wait_for_function("document.body?.dataset.ready === 'yes'", timeout=120_000)
    page.wait_for_function("document.getElementById('live').textContent.startsWith('The server does not answer')")
    assert page.locator(".state").first.inner_text().startswith("1 of 3 trials ended")
