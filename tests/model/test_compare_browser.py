# SPDX-License-Identifier: Apache-2.0
"""The report in Chromium: clips play, charts are drawn, nothing is fetched, a phone can read it."""

import json
import shutil

import pytest

from disca.compare.report import write_report
from tests.model.comparisons import write_comparison

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
)

SWITCHES = (
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",  # a container's is small
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison(folder)
    return write_report(folder).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def resize(browser, width, height=800):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def page(browser, address):
    """The open report, as wide as a screen, with what the browser logged while it was opened."""
    resize(browser, 1280)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(address)
    return browser


def shot_at(page, clip, milliseconds):
    """A picture of a clip after a time of its animation, which is stopped there."""
    page.execute_script(
        "const a = arguments[0].getAnimations()[0]; a.pause(); a.currentTime = arguments[1];",
        clip,
        milliseconds,
    )
    return clip.screenshot_as_png


def test_charts_and_clips_are_drawn(page):
    widths = page.execute_script(
        "return [...document.images].map(i => [i.className, i.complete ? i.naturalWidth : 0])"
    )
    # two groups: 5 charts each, and 2 clips of 2 rows and of real clips
    assert sum(name == "chart" for name, _ in widths) == 10
    assert sum(name == "clip moving" for name, _ in widths) == 12
    assert all(width > 0 for _, width in widths)


def test_clips_play(page):
    """Time passes in a clip by itself, and each of its 4 frames is another picture."""
    clip = page.find_element("css selector", "img.clip")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", clip)
    moved = page.execute_async_script(
        """const [clip, done] = arguments, animation = clip.getAnimations()[0];
        const begin = animation.currentTime, place = getComputedStyle(clip).objectPosition;
        const look = () => getComputedStyle(clip).objectPosition === place
          ? requestAnimationFrame(look)
          : done([animation.playState, animation.currentTime - begin]);
        look();""",
        clip,
    )
    assert moved[0] == "running"
    assert moved[1] > 0
    # 8 frames a second: the middle of the frames, then the first again
    shots = [shot_at(page, clip, 125 * (i + 0.5)) for i in range(5)]
    assert len(set(shots[:4])) == 4
    assert shots[4] == shots[0]


def test_all_clips_play_in_step(page):
    starts = page.execute_script(
        "return [...document.querySelectorAll('img.clip')].map(c => c.getAnimations()[0].startTime)"
    )
    assert len(starts) == 12
    assert len(set(starts)) == 1


def test_clips_can_be_paused(page):
    box = page.find_element("id", "pause")
    states = "return [...new Set(document.getAnimations().map(a => a.playState))]"
    assert page.execute_script(states) == ["running"]
    box.click()
    assert page.execute_script(states) == ["paused"]
    box.click()
    assert page.execute_script(states) == ["running"]


def test_the_console_stays_empty_and_nothing_is_fetched(page):
    assert page.get_log("browser") == []
    requests = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert any(url.startswith("file:") for url in requests)
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}


@pytest.mark.parametrize("width", [390, 320, 1280])
def test_only_boxes_scroll_sideways(page, width):
    resize(page, width)
    inner, scroll = page.execute_script(
        "return [document.documentElement.clientWidth, document.documentElement.scrollWidth]"
    )
    assert (inner, scroll) == (width, width)


def test_tables_scroll_in_their_box_on_a_phone(page):
    resize(page, 390)
    inner, scroll = page.execute_script(
        "const b = document.querySelector('.scroll'); return [b.clientWidth, b.scrollWidth]"
    )
    assert inner < 390 < scroll
