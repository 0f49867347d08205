"""The page in a browser: masks become words, switches switch, and nothing a model says is more than text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib import resources

import pytest

from tests.server.serving import Served, serving, until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not tested")
expect, Page, Browser = playwright.expect, playwright.Page, playwright.Browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FILES = {
    file.name: file.read_text(encoding="utf-8")
    for file in (resources.files("offload_engine.server") / "page").iterdir()
}
PROBLEM = "A box holds 12 pencils. How many pencils are in 7 boxes?"
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const count = (name) => document.querySelectorAll(`.cell.${name}`).length;
        const sure = [...document.querySelectorAll(".cell.new")].map((cell) => Number(cell.dataset.sure));
        window.seen.push({ masked: count("masked"), fresh: count("new"), sure });
    }).observe(document.getElementById("panels"), { childList: true, subtree: true });
}"""

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH: the page is NOT tested in a browser"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page as somebody opens it. Ends with a look at what the browser complained of."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(served.url)
    yield page
    page.close()
    assert [text for text in complaints if "the server responded with a status of 400" not in text] == []


def ask(page: Page, text: str = PROBLEM, routing: str = "dMoE") -> None:
    page.get_by_text(routing, exact=True).first.click()
    page.get_by_label("Prompt").fill(text)
    page.get_by_label("Prompt").press("Enter")


@needs_browser
def test_masks_become_words_and_the_answer_is_read(page: Page):
    page.evaluate(WATCH)
    ask(page)
    expect(page.locator(".boxed strong")).to_have_text("84")
    expect(page.locator(".answer")).to_contain_text("12*7=84 pencils. \\boxed{84}")
    expect(page.locator(".status")).to_contain_text("tokens in")
    seen = page.evaluate("() => window.seen")
    masked = [one["masked"] for one in seen]
    assert max(masked) >= 24, "a block begins with masks"
    assert masked[-1] == 0
    assert len(set(masked)) > 4, "they go step by step"
    marked = [one for one in seen if one["fresh"]]
    assert len(marked) >= 3
    assert all(0 <= share <= 100 for one in marked for share in one["sure"])
    for name in ("tokens", "steps", "unique", "hits", "moved", "stalled"):
        assert re.search(r"\d", page.locator(f"[data-counter={name}]").inner_text()), name
    assert int(page.locator(".used-count").inner_text()) >= 3 * 8
    assert "Experts of 3 layers" in page.locator(".heat canvas").get_attribute("aria-label")
    drawn = page.evaluate(
        """() => {
            const canvas = document.querySelector(".heat canvas");
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const pixel = (_, at) => pixels.slice(4 * at, 4 * at + 4).join();
            return new Set(Array.from({ length: pixels.length / 4 }, pixel)).size;
        }"""
    )
    assert drawn >= 3
    expect(page.locator("#memory p")).to_have_text(re.compile(r"used .+B at most · planned .+B · limit .+B"))


@needs_browser
def test_routing_and_p_are_what_is_asked_for(page: Page):
    sent: list[dict[str, object]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.get_by_label("p of dMoE").fill("0.8")
    page.get_by_text("Step by step").click()
    ask(page)
    expect(page.locator("h2")).to_have_text("dMoE, p = 0.80")
    expect(page.locator(".boxed strong")).to_have_text("84")
    ask(page, routing="Original")
    expect(page.locator("h2")).to_have_text("Original routing")
    expect(page.locator(".boxed strong")).to_have_text("84")
    expect(page.get_by_label("p of dMoE")).to_be_disabled()
    assert [(one["routing"], one.get("routing_top_p"), one.get("steps")) for one in sent] == [
        ("dmoe", 0.8, None),
        ("original", None, None),
    ]


@needs_browser
def test_side_by_side(page: Page):
    ask(page, routing="Side by side")
    verdict = page.locator("#verdict")
    expect(verdict).to_have_text(
        re.compile(r"dMoE used [\d.]+ experts per layer where original routing used [\d.]+: \d+ %")
    )
    expect(verdict).to_contain_text("came to the same answer")
    assert page.locator("h2").all_inner_texts() == ["Original routing", "dMoE, p = 0.60"]
    assert page.locator(".boxed strong").all_inner_texts() == ["84", "84"]
    original, dmoe = (float(text) for text in page.locator("[data-counter=unique]").all_inner_texts())
    assert dmoe < 0.6 * original


@needs_browser
def test_stop_midway(browser: Browser, endless_engine):
    with serving(endless_engine) as served:
        page = browser.new_page()
        page.goto(served.url)
        for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
            ask(page)
            expect(page.locator(".status")).to_contain_text("block 2")
            stop()
            expect(page.locator(".status")).to_have_text("stopped")
            assert page.locator(".answer").inner_text().strip(), "what was decided stays"
            until(lambda: served.server.batcher.active == 0)
            expect(page.get_by_role("button", name="Ask")).to_be_enabled()
            expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        page.close()


@needs_browser
def test_what_the_model_says_is_never_html(page: Page):
    nasty = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>"
    experts = {"held": ["r"], "used": [[0]]}
    counters = {"denoise_steps": 1, "wall_seconds": 1, "bytes_moved": 1}
    told = {"block": 0, "step": 1, "cells": [nasty, None], "accepted": [[0, 0.5]], "text": nasty, "experts": experts}
    end = {"text": f"{nasty}\\boxed{{{nasty}}}", "finish_reason": "stop", "usage": {"completion_tokens": 2}}
    events = [
        ("begin", {"layers": [1], "experts": 1, "block_length": 2}),
        ("step", told | {"counters": counters}),
        ("block", told | {"counters": counters}),
        ("end", end | {"counters": counters}),
    ]
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    page.route("**/v1/denoise", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page)
    expect(page.locator(".status")).to_contain_text("2 tokens in 1 steps")
    assert nasty in page.locator(".answer").inner_text()
    assert page.locator(".boxed strong").inner_text() == nasty
    assert page.locator("#panels img, #panels script, .answer b").count() == 0
    assert page.title() == "offload_engine"


@needs_browser
def test_errors_are_told(page: Page):
    page.route(
        "**/v1/denoise",
        lambda route: route.fulfill(status=400, json={"error": {"message": "the prompt is <b>too</b> long"}}),
    )
    page.get_by_label("Prompt").fill("x")
    with page.expect_console_message(lambda message: "400" in message.text):  # the browser's own line
        page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_role("alert")).to_have_text("the prompt is <b>too</b> long")


@needs_browser
def test_the_key_is_asked_for(browser: Browser, spare_engine):
    with serving(spare_engine, api_key="the-key-of-this-server") as served:
        page = browser.new_page()
        page.goto(served.url)
        expect(page.get_by_label("This server wants an API key.")).to_be_focused()
        page.keyboard.type("the-key-of-this-server")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("built-in")
        ask(page)
        expect(page.locator(".boxed strong")).to_have_text("84")
        page.close()


@needs_browser
def test_the_keyboard_reaches_everything(page: Page):
    expect(page.locator("#model")).to_have_text("built-in")
    page.get_by_label("Prompt").focus()
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("37 + 58?")
    assert page.get_by_label("Prompt").input_value() == "What is\n37 + 58?"
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "() => document.activeElement.id || document.activeElement.value || document.activeElement.textContent"
            )
        )
    assert reached[:4] == ["dmoe", "p", "slowly", "go"]
    page.keyboard.press("Shift+Tab")
    page.get_by_role("radio", name="dMoE").focus()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("radio", name="Original").is_checked()
    page.get_by_role("button", name="Ask").focus()
    page.keyboard.press("Enter")
    expect(page.locator("h2")).to_have_text("Original routing")
    expect(page.locator(".boxed strong")).to_have_text("95")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1600])
def test_it_fits_any_width_and_both_schemes(browser: Browser, served: Served, scheme: str, width: int):
    page = browser.new_page(viewport={"width": width, "height": 700}, color_scheme=scheme)
    page.goto(served.url)
    ask(page, routing="Side by side")
    expect(page.locator("#verdict")).to_contain_text("fewer")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    paper = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", paper)[:3])
    assert (brightness > 600) == (scheme == "light")
    page.close()


def variables(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_both_schemes():
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what must be seen to be understood."""
    light, dark = FILES["page.css"].split("@media (prefers-color-scheme: dark)", 1)
    for block in (light, dark.split("}", 1)[0]):
        found = variables(block)
        pairs = [("ink", "paper"), ("ink", "card"), ("quiet", "paper"), ("quiet", "card"), ("accent", "card")]
        pairs += [("on-accent", "accent"), ("ink", "new"), ("ink", "unsure"), ("alarm", "paper")]
        for least, names in [(4.5, pairs), (3.0, [("used", "card"), ("loading", "card")])]:
            for front, back in names:
                low, high = sorted((luminance(found[front]), luminance(found[back])))
                assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_html():
    assert {"index.html", "page.css", "main.js", "panel.js", "heatmap.js", "stream.js", "icon.svg"} <= FILES.keys()
    for name, text in FILES.items():
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc", text
        ), name
        assert not re.search(r"<[^>]+ (on\w+|style)=", text), f"{name}: would be refused by the page's own policy"


def test_the_page_comes_with_a_policy(served: Served):
    for path in ("/", "/page/main.js", "/page/page.css", "/page/icon.svg"):
        response = served.http.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/", "/page/nope.js", "/page/..%2fpages.py", "/page/__init__.py"):
        assert served.http.get(path).status_code == 404
