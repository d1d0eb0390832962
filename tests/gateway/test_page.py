"""The page in a real Chromium, typed and clicked at the widths of a desktop and a phone, as a person would."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from benchmarks.synthetic import make_cross_encoder
from preread_edge.access import ApiKeys

ARTEFACTS = Path(__file__).parent.parent / "artefacts"
SIZES = {"desktop": (1280, 1000), "phone": (390, 1500)}
# Markup in ids and texts, which must not run or show any effect.
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
TEXTS = {
    "sky": "The sky is blue because air scatters short waves of light.",
    "grass": "Grass is green because chlorophyll reflects green light.",
    "sea": "The sea looks blue because water absorbs red light.",
    f"<b>{HOSTILE}</b>": f"Blue {HOSTILE} \U0001f30a & 'quotes' \"too\" $(echo owned) `light`",
    "paris": "Paris is the capital of France.",
}


class Page:
    """The page in one browser."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, url: str, size: str = "desktop", scheme: str = "light") -> None:
        width, height = SIZES[size]
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.get("about:blank")  # a fragment alone loads nothing
        self.browser.get(url)
        self.settled()

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def texts(self, selector: str) -> list[str]:
        return [one.text for one in self.all(selector)]

    def settled(self) -> None:
        """Waits until the page has asked everything that it wanted to."""
        from selenium.webdriver.support.ui import WebDriverWait

        ready = "return document.readyState == 'complete' && document.body.className == 'idle'"
        WebDriverWait(self.browser, 60).until(lambda browser: browser.execute_script(ready))

    def type(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def choose(self, selector: str, value: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_value(value)

    def offered(self, selector: str) -> list[str]:
        return [one.get_attribute("value") for one in self.all(f"{selector} option")]

    def click(self, selector: str) -> None:
        button = self.find(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        self.settled()

    @property
    def said(self) -> str:
        return str(self.find("#said").text)

    @property
    def asked(self) -> str:
        """Why the page wants a key, or another."""
        return str(self.find("#asked").text)

    def shows_results(self) -> bool:
        return bool(self.all("#columns *, #comparison *")) or self.find("#outcome").is_displayed()

    def script(self, text: str) -> Any:
        return self.browser.execute_script(text)

    def shoot(self, name: str) -> None:
        ARTEFACTS.mkdir(exist_ok=True)
        path = ARTEFACTS / f"page-{name}.png"
        assert self.browser.get_screenshot_as_file(str(path))
        print(f"screenshot: {path}")  # noqa: T201 - where the artefact lies

    def severe(self) -> list[str]:
        """Messages of the console, CSP violations and exceptions; an error that the server answers is none."""
        lines = [line["message"] for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]
        return [line for line in lines if "Failed to load resource" not in line]


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    page = Page(browser)
    yield page
    assert not page.severe()


def fill(running: Any, name: str = "docs", texts: dict[str, str] = TEXTS, key: str = "") -> None:
    body = {"passages": [{"id": one, "text": text} for one, text in texts.items()], "compression_ratio": 4}
    stored = running.post(f"/v1/collections/{name}/passages", body, headers={"api-key": key})
    assert stored.json()["num_stored"] == len(texts), stored.text


def lines(folder: Path, texts: dict[str, str], name: str = "few.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"id": one, "text": text}) + "\n" for one, text in texts.items()))
    return path


@pytest.fixture
def two(run: Any, tmp_path: Path) -> Iterator[Any]:
    """A model that reads states, a cross-encoder next to it, and a collection."""
    beside = make_cross_encoder(tmp_path / "cross", "BertForSequenceClassification")
    with run(beside=beside) as running:
        fill(running)
        yield running


def test_the_page_allows_nothing_from_elsewhere(running: Any) -> None:
    response = running.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]* src=\"/page/)|<style|\son\w+=|style=|https?:", response.text)
    waiting, seen = ["main.js", "page.css", "icon.svg"], set[str]()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        served = running.http.get(f"/page/{name}")
        assert served.status_code == 200, name
        assert served.headers["content-security-policy"] == policy
        if name.endswith(".js"):
            imported = re.findall(r'from "\./([\w.]+)"', served.text)
            waiting += [one for one in imported if one not in seen]
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", served.text)
    assert len(seen) > 5


@pytest.mark.slow
def test_passages_are_ranked_at_every_ratio(running: Any, page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    for size, (width, _) in SIZES.items():
        for scheme in ("light", "dark"):
            page.open(running.url, size, scheme)
            page.find("#query").send_keys(Keys.ENTER)
            page.settled()
            cards = page.all("#columns li")
            assert len(cards) == 4
            for card in cards:
                rows = [line.text.split() for line in card.find_elements("css selector", "tr")]
                assert rows[0] == ["ratio", "1", "2", "4", "8", "16", "32"]
                assert [row[0] for row in rows] == ["ratio", "score", "margin", "states", "ms"]
                assert card.find_elements("css selector", "mark[style*=background]")
            leads = page.all("#columns table .lead")
            assert len(leads) == 4
            leads[3].click()
            assert page.script("return document.activeElement == document.querySelectorAll('#columns li')[3]")
            assert page.script("return document.documentElement.scrollWidth") <= width
            page.shoot(f"{size}-{scheme}")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_two_models_rank_what_is_found_by_words(two: Any, page: Page, size: str) -> None:
    page.open(two.url, size)
    assert page.texts("#about") == ["tiny-reranker, float32 on cpu; cross, float32 on cpu"]
    page.choose("#collection", "docs")
    assert not page.find("#passages").is_displayed()
    assert page.offered("#ratio") == ["4", "8", "16", "32"]
    page.choose("#beside", "cross")
    page.choose("#ratio", "8")
    page.type("#query", "Why is the sky blue?")
    page.click("#go")
    # BM25 on "why", "sky", "blue": the passage on Paris shares no word, that on grass neither.
    assert page.said == "3 passages for “Why is the sky blue?”"
    assert page.texts("#columns h2") == ["tiny-reranker", "cross"]
    names = [page.texts(f"#columns section:nth-child({side}) .head .id") for side in (1, 2)]
    assert sorted(names[0]) == sorted(names[1]) == sorted(one for one in TEXTS if one not in ("grass", "paris"))
    rows = page.all("#comparison tr")
    assert len(rows) == 2 + 3
    by_name = {row.find_element("css selector", "th").text: row.text.split() for row in rows[2:]}
    for side in (0, 1):
        for place, name in enumerate(names[side], 1):
            assert f"{place}." in by_name[name]
    # The scores are those of the API.
    ids = [one["id"] for one in two.post("/v1/collections/docs/search", {"query": "why sky blue"}).json()["data"]]
    body = {"query": "Why is the sky blue?", "collection": "docs", "passage_ids": ids, "return_margins": True}
    for side, more in ((0, {"compression_ratio": 8}), (1, {"model": "cross"})):
        ranked = two.post("/v1/rerank", body | more).json()["results"]
        assert [one["id"] for one in ranked] == names[side]
        shown = page.texts(f"#columns section:nth-child({side + 1}) .head b")
        assert [float(one.split()[1]) for one in shown] == pytest.approx(
            [one["relevance_score"] for one in ranked], abs=6e-4
        )
    assert page.script("return document.documentElement.scrollWidth") <= SIZES[size][0]
    assert page.script("return document.title") == "Preread"
    assert not page.all("#columns img, #comparison img, #columns script")
    assert TEXTS["sky"] in page.texts("#columns .text")
    assert next(text for name, text in TEXTS.items() if name.startswith("<b>")) in page.texts("#columns .text")
    page.shoot(f"two-{size}")
    # A second model alone is one column, and reads no states.
    page.choose("#model", "cross")
    assert not page.find("#ratio").is_displayed()
    page.choose("#by", "ids")
    page.type("#ids", "paris  sky\ngrass")
    page.click("#go")
    assert page.texts("#columns h2") == ["cross"]
    assert sorted(page.texts("#columns .head .id")) == ["grass", "paris", "sky"]
    page.choose("#by", "first")
    page.type("#count", "2")
    page.click("#go")
    assert len(page.all("#columns li")) == 2
    # A text over the cross-encoder's limit is scored as far as it goes, and its card says so.
    fill(two, "long", {"long": "sky " * 5000})
    page.open(f"{two.url}/#collection=long&model=cross&query=sky", size)
    page.click("#go")
    assert page.texts("#columns .status") == ["cut at the model's limit"]
    page.choose("#by", "first")
    page.type("#count", "17")
    page.click("#go")
    assert page.said == "how many is '17'; expected 1 to 16"
    page.type("#query", "")
    page.type("#count", "1")
    page.click("#go")
    assert page.said.startswith("query is ''; expected")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_commands_run_and_give_what_was_shown(two: Any, page: Page, size: str) -> None:
    allowed = {"origin": two.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", allowed)
    page.open(two.url, size)
    page.choose("#collection", "docs")
    page.choose("#beside", "cross")
    page.type("#query", "It's the \"blue\" $HOME `light`; isn't it?")
    page.click("#go")
    page.click("#curl")
    assert page.said == "Commands copied"
    copied = page.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == page.find("#commands").text
    answers = [
        json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout)
        for line in copied.split("\n")
    ]
    found, explained, ranked = answers
    names = [page.texts(f"#columns section:nth-child({side}) .head .id") for side in (1, 2)]
    ids = [one["id"] for one in found["data"]]
    assert [one["passage_id"] for one in explained["results"]] == names[0]
    assert [one["id"] for one in ranked["results"]] == names[1]
    assert sorted(ids) == sorted(names[0])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_link_fills_the_form(two: Any, page: Page, size: str) -> None:
    page.open(two.url, size)
    page.choose("#collection", "docs")
    page.choose("#by", "ids")
    page.choose("#model", "cross")
    page.choose("#beside", "tiny-reranker")
    page.choose("#ratio", "16")
    page.type("#ids", "sky sea")
    page.type("#query", f"Blue & green? {HOSTILE}")
    page.find("#ask summary").click()
    page.type("#instruction", "Find colours.")
    page.click("#share")
    link = page.browser.current_url
    assert link.startswith(f"{two.url}/#query=Blue+%26+green%3F")
    page.click("#go")
    before = page.texts("#comparison tr")
    assert page.browser.current_url == link
    page.open(two.url, size)
    assert page.find("#query").get_attribute("value") == "Why is the sky blue?"
    page.script(f"location.hash = {json.dumps(link.partition('#')[2])}")  # in the same tab: nothing is loaded
    page.settled()
    for _ in range(2):
        values = [page.find(f"#{one}").get_attribute("value") for one in ("query", "ids", "model", "beside", "ratio")]
        assert values == [f"Blue & green? {HOSTILE}", "sky sea", "cross", "tiny-reranker", "16"]
        assert page.find("#instruction").get_attribute("value") == "Find colours."
        assert not page.shows_results()
        page.click("#go")
        assert page.texts("#comparison tr") == before
        page.open(link, size)
    # What a link names and the server lacks stays in the form, and the server says so.
    page.open(f"{two.url}/#collection=gone&by=%3Cscript%3E&model={'x' * 20}&nonsense=1&count=3", size)
    assert page.find("#collection").get_attribute("value") == "gone"
    page.choose("#model", "tiny-reranker")
    page.click("#go")
    assert "'gone' does not exist" in page.said
    assert page.script("return document.title") == "Preread"


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_an_error_takes_the_place_of_results(two: Any, page: Page, size: str) -> None:
    page.open(two.url, size)
    page.choose("#collection", "docs")
    page.choose("#beside", "cross")
    page.click("#go")
    assert page.shows_results()
    page.type("#words", "of unheard words")
    page.click("#go")
    assert page.said == "no passage of docs has a word of “of unheard words”"
    assert not page.shows_results()
    assert page.script("return document.getElementById('said').getBoundingClientRect().top < innerHeight")
    page.type("#words", "")
    page.find("#ask summary").click()
    page.type("#instruction", "word " * 600)  # longer than the first model's instructions may be
    page.click("#go")
    # The second model takes no instruction: its column stands, and the first says why it has none.
    assert "expected at most 512 tokens" in page.find("#columns section:first-child .wrong").text
    assert len(page.all("#columns section:last-child li")) == 3
    assert not page.all("#comparison *, #columns section:first-child li")
    page.choose("#beside", "")
    page.click("#go")
    assert "expected at most 512 tokens" in page.said
    assert not page.shows_results()
    page.type("#instruction", "")
    two.server.store.drop_collection("docs")
    page.click("#go")
    assert "'docs' does not exist" in page.said
    assert not page.shows_results()
    two.call(two.gateway.stop(1))
    page.click("#go")
    assert page.said == "The server does not answer; is it still running?"


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_key_is_asked_for_and_kept_in_the_tab_alone(run: Any, page: Page, tmp_path: Path, size: str) -> None:
    from selenium.webdriver.common.keys import Keys

    reads, writes = "reads-0123456789abc", "index,rerank:writes-0123456789ab"
    with run(keys=ApiKeys.parse([f"rerank:{reads}", writes])) as guarded:
        fill(guarded, key=writes.partition(":")[2])
        page.open(f"{guarded.url}/#collection=docs&ratio=8", size)
        assert page.asked == "the API key is missing or not one of this server; expected Authorization: Bearer KEY"
        assert page.script("return document.activeElement.id") == "key"
        page.shoot(f"key-{size}")
        page.find("#key").send_keys("a wrong key", Keys.ENTER)
        assert page.asked.endswith("expected ASCII")
        page.type("#key", "wrong-0123456789")
        page.find("#key").send_keys(Keys.ENTER)
        page.settled()
        assert "not one of this server" in page.asked
        assert page.script("return sessionStorage.length") == 0
        page.find("#key").send_keys(reads, Keys.ENTER)
        page.settled()
        assert page.said == page.asked == ""
        assert page.find("#collection").get_attribute("value") == "docs", "what the link said waited for the key"
        assert page.find("#ratio").get_attribute("value") == "8"
        page.click("#go")
        assert len(page.all("#columns li")) == 3
        commands = page.find("#commands").text
        assert '-H "authorization: Bearer $PREREAD_API_KEY"' in commands
        link = page.browser.current_url
        assert reads not in commands + link + page.script("return JSON.stringify(localStorage) + document.cookie")
        page.browser.refresh()
        page.settled()
        page.click("#go")
        assert len(page.all("#columns li")) == 3, "a reload keeps the key"
        # A key that may not write: the upload says so, and goes on with another.
        page.find("#uploading summary").click()
        page.find("#file").send_keys(str(lines(tmp_path, {"a": "A text."})))
        page.click("#upload")
        assert "this key lacks the scope index" in page.asked
        page.find("#key").send_keys(writes.partition(":")[2], Keys.ENTER)
        page.settled()
        assert page.said.startswith("1 passage stored in throwaway-")
        page.click("#forget")
        assert page.script("return sessionStorage.length") == 0
        assert "the API key is missing" in page.asked
        assert not page.shows_results()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_small_file_becomes_a_collection_until_it_is_dropped(
    running: Any, page: Page, tmp_path: Path, size: str
) -> None:
    def uploaded(path: Path) -> str:
        page.find("#file").send_keys(str(path))
        page.click("#upload")
        return page.said

    page.open(running.url, size)
    page.find("#uploading summary").click()
    page.click("#upload")
    assert page.said == "file is absent; expected a JSONL file"
    said = uploaded(lines(tmp_path, TEXTS))
    name = page.find("#collection").get_attribute("value")
    assert re.fullmatch(r"throwaway-\d{8}-\d{6}-[0-9a-f]{8}", name)
    assert said == f"5 passages stored in {name}; drop it when you are done"
    assert "throw-away" in page.find("#collection option:checked").text
    page.type("#query", "green light")
    page.click("#go")
    assert len(page.all("#columns li")) == 4
    page.shoot(f"upload-{size}")
    page.click("#drop")
    assert page.said == f"{name} is gone (5 passages)"
    assert not page.find("#drop").is_displayed()
    assert not page.shows_results()
    assert name not in page.offered("#collection")

    (wrong := tmp_path / "wrong.jsonl").write_text('{"id": "a", "text": "fine"}\n{"id": "b"}\n')
    assert uploaded(wrong).startswith("line 2.text is 'absent'; expected a value")
    many = lines(tmp_path, {f"p{i}": "text" for i in range(1001)}, "many.jsonl")
    assert uploaded(many) == "file has 1,001 lines; expected 1 to 1,000"
    (large := tmp_path / "large.jsonl").write_text("x" * ((2 << 20) + 1))
    assert uploaded(large) == "file is 2,097,153 bytes long; expected at most 2,097,152 bytes"
    (empty := tmp_path / "empty.jsonl").write_text(" \n")
    assert uploaded(empty) == "file has 0 lines; expected 1 to 1,000"
    left = [one["id"] for one in running.http.get("/v1/collections").json()["data"]]
    assert not any(one.startswith("throwaway-") for one in left), "of a wrong file nothing stays"


@pytest.mark.slow
def test_names_of_models_and_messages_of_errors_are_text(run: Any, page: Page) -> None:
    with run(name=HOSTILE) as running:
        page.open(f"{running.url}/#collection={quote(HOSTILE)}&by=ids&ids={quote(HOSTILE)}")
        assert HOSTILE in page.find("#about").text
        page.click("#go")
        assert "<img" in page.said
        page.choose("#collection", "")
        page.click("#go")
        assert page.texts("#columns h2") == [HOSTILE]
        assert page.script("return document.title") == "Preread"
        assert not page.all("img, body script")


@pytest.mark.slow
def test_numbers_tell_candidates_apart(running: Any, page: Page) -> None:
    page.open(running.url)

    def shown(kind: str, values: list[float]) -> list[str]:
        mapped = f"(they) => arguments[1](arguments[0].map(they.{kind}(arguments[0])))"
        imported = f"import('/page/numbers.js').then({mapped})"
        return list(page.browser.execute_async_script(imported, values))

    assert shown("scores", [0.78181, 0.12132]) == ["0.782", "0.121"]
    assert shown("scores", [0.9999, 0.99999]) == ["0.99990", "0.99999"]
    assert shown("scores", [0.9999999403953552, 1.0]) == ["0.9999999", "1.0000000"], "the largest float32 below 1"
    assert shown("scores", [0.0002, 0.0]) == ["0.0002", "0.0000"]
    assert shown("scores", [3e-9, 3.1e-9, 0.5]) == ["3.000e-9", "3.100e-9", "0.500"]
    assert shown("scores", [0.5, 0.5]) == ["0.500", "0.500"]
    assert shown("margins", [1.28, -1.976, -500.0]) == ["+1.28", "−1.98", "−500.00"]
    assert shown("margins", [16.11801, 16.11802]) == ["+16.11801", "+16.11802"]


@pytest.mark.slow
def test_a_person_needs_no_mouse(two: Any, page: Page) -> None:
    """Nothing but keys, in the order that Tab gives, and every field has a name."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.open(two.url)

    def press(*keys: str) -> None:
        ActionChains(page.browser).send_keys(*keys).perform()

    def focused() -> str:
        return str(page.script("return document.activeElement.id || document.activeElement.tagName"))

    order = []
    for _ in range(9):
        press(Keys.TAB)
        order.append(focused())
    assert order == ["query", "collection", "passages", "model", "beside", "ratio", "SUMMARY", "go", "share"]
    page.find("#query").click()
    press(Keys.TAB, "docs", Keys.TAB)
    assert focused() == "by"
    press(Keys.TAB, "grass", Keys.TAB, Keys.TAB, Keys.TAB, "cross")
    assert page.find("#beside").get_attribute("value") == "cross"
    ActionChains(page.browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.settled()
    assert page.texts("#columns .head .id") == ["grass", "grass"]
    assert focused() == "beside", "the focus stays where it was"
    unnamed = (
        "return [...document.querySelectorAll('input, select, textarea')].filter(one => !one.labels.length).length"
    )
    assert page.script(unnamed) == 0
