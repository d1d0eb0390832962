"""The page in a real Chromium: it ranks, shows every ratio, draws attention, and asks no other host."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ARTEFACTS = Path(__file__).parent.parent / "artefacts"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


def test_the_page_allows_nothing_from_elsewhere(running: Any) -> None:
    response = running.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    for name in ("page.js", "page.css", "icon.svg"):
        assert running.http.get(f"/page/{name}").status_code == 200
        assert f"/page/{name}" in response.text


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("NO BROWSER, THE PAGE IS NOT TESTED: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="NO SELENIUM, THE PAGE IS NOT TESTED")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path}/profile"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.mark.slow
def test_a_person_ranks_with_the_keyboard(running: Any, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    ARTEFACTS.mkdir(exist_ok=True)
    for name, width, height in (("desktop", 1280, 1000), ("phone", 390, 1500)):
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(running.url)
            query = browser.find_element(By.ID, "query")
            query.clear()
            assert not browser.find_element(By.ID, "wanted").is_displayed()
            query.send_keys("Why is the sky blue?", Keys.ENTER)
            WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#results li"))
            cards = browser.find_elements(By.CSS_SELECTOR, "#results li")
            assert len(cards) == 4
            places = browser.find_elements(By.CSS_SELECTOR, "#overview a")
            assert [place.get_attribute("hash") for place in places] == [f"#place-{i}" for i in range(1, 5)]
            for card in cards:
                ratios = [cell.text for cell in card.find_elements(By.CSS_SELECTOR, "tr:first-child td")]
                assert ratios == ["1", "2", "4", "8", "16", "32"]
                assert card.find_elements(By.CSS_SELECTOR, "mark[style*=background]")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            path = ARTEFACTS / f"page-{name}-{scheme}.png"
            shot = browser.get_screenshot_as_file(str(path))
            assert shot
            print(f"screenshot: {path}")  # noqa: T201 - where the artefact lies
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.mark.slow
def test_a_person_picks_a_collection_with_the_keyboard(running: Any, browser: Any) -> None:
    """Nothing but keys, in the order that Tab gives; what is offered is what the collection is stored at."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    texts = ["The sky is blue because air scatters short waves.", "<b>Grass</b> is green.", "Paris is in France."]
    passages = [{"id": f"p{i}", "text": text} for i, text in enumerate(texts)]
    stored = running.post("/v1/collections/picked/passages", {"passages": passages, "compression_ratio": 4})
    assert stored.json()["num_stored"] == 3, stored.text
    browser.get(running.url)
    named = "option[value='picked']"
    WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, named))

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    def focused() -> str:
        return str(browser.execute_script("return document.activeElement.id || document.activeElement.tagName"))

    order = []
    for _ in range(6):
        press(Keys.TAB)
        order.append(focused())
        if order[-1] == "collection":
            break
    assert order == ["query", "SUMMARY", "collection"]
    press("picked")
    WebDriverWait(browser, 10).until(lambda b: b.find_element(By.ID, "wanted").is_displayed())
    assert not browser.find_element(By.ID, "passages").is_displayed()
    assert [one.text for one in Select(browser.find_element(By.ID, "ratio")).options] == ["4", "8", "16", "32"]
    press(Keys.TAB)
    assert focused() == "wanted"
    press("p1 p0")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#results li"))
    cards = browser.find_elements(By.CSS_SELECTOR, "#results li")
    assert {card.find_element(By.CSS_SELECTOR, ".id").text for card in cards} == {"p0", "p1"}
    assert {card.find_element(By.CSS_SELECTOR, ".status").text for card in cards} == {"stored"}
    assert {card.find_element(By.CSS_SELECTOR, ".text").text for card in cards} == {texts[0], texts[1]}
    rows = [line.text.split() for line in browser.find_elements(By.CSS_SELECTOR, "#overview tr")]
    assert rows[0] == ["ratio", "4", "8", "16", "32"]
    assert [len(line) for line in rows[1:]] == [6, 6]
    path = ARTEFACTS / "page-collection.png"
    ARTEFACTS.mkdir(exist_ok=True)
    assert browser.get_screenshot_as_file(str(path))
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
