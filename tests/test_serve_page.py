"""The live page in a real browser, over a real server."""

import shutil

import numpy as np
import pytest

from tests.test_serve_rollout import LARGE, at, good, rolled_back
from tests.test_serve_runs import QUICK, Served, faulty, inputs, run_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser, served, width):
    """The page, and what its console says."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: (
            said.append(f"outside: {request.url}")
            if not request.url.startswith((served.url, "data:"))
            else None
        ),
    )
    page.goto(served.url)
    page.wait_for_selector("#live:not(.gone) >> text=live")
    return page, said


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_shows_a_rollout_and_moves_it(browser, tmp_path, width):
    policy = QUICK.replace("dwell_s = 0.5", "dwell_s = 1000.0")
    folder = run_folder(tmp_path / "run", lambda path: faulty(path, "class"), quick=policy)
    with Served(folder) as served:
        served.until(at("shadow"))
        for n in range(20):
            good(served, inputs(1, n))
        good(served, LARGE + np.arange(4, dtype=np.float32))
        served.until(lambda status: status["examples"] and len(status["windows"]) > 2)
        page, said = opened(browser, served, width)
        assert page.inner_text("h1") == "tiny" and "Shadow" in page.inner_text("#stage")
        assert page.inner_text("#track .now") == "Shadow"
        page.wait_for_selector("#guards li >> nth=3")
        assert "time" in page.inner_text("#missing")
        assert page.locator("#latency path, #latency circle").count() >= 2
        assert "different answers" in page.inner_text("#examples")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("text=Pause")
        page.fill("#reason", "<b>a look</b>")
        page.fill("#token", "x" * 20)
        page.click("#go")
        page.wait_for_selector("#refusal:not([hidden])")
        page.fill("#token", served.token)
        page.click("#go")
        page.wait_for_selector("#stage >> text=Paused")
        assert "<b>a look</b>" in page.inner_text("#history")
        assert page.is_disabled("[data-action=promote]")
        assert page.is_enabled("[data-action=resume]")
        page.click("[data-action=abort]")
        page.fill("#reason", "seen enough")
        page.click("#go")
        page.wait_for_selector("#stage >> text=Rolled back")
        served.until(rolled_back)
        assert not [each for each in said if "401" not in each]
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        page.close()


def test_the_page_says_when_the_server_is_gone(browser, tmp_path):
    with Served(run_folder(tmp_path / "run")) as served:
        page, _ = opened(browser, served, 1280)
    page.wait_for_selector("#live.gone")
    page.close()
