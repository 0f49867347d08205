"""Draws the server's page for the documentation: side by side in light, midway in dark.

python -m tools.page_screenshots --out docs/images
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offload_engine.cli.errors import ReportingCommand
from offload_engine.errors import UsageError
from tools.bench_server import served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

QUESTION = (
    "How many feathers do I have if I have 48 feathers, give 26 of the feathers to Jack and a friend gives me 4 more?"
)
ENGINE = ["--gpu-mem", "500MB", "--expert-mem", "6MB", "--max-context", "2048", "--threads", "1"]
SIZE = {"width": 1280, "height": 900}
MOST_TURNS = 500
"""Looks at the page before it is given up."""


def draw(browser: Browser, url: str, path: Path, *, scheme: str, until: str) -> None:
    """Ask the question side by side, and draw the page once the last of its panels says `until`."""
    page = browser.new_page(viewport=SIZE, color_scheme=scheme)
    page.clock.install(time=0)
    page.goto(url)
    page.clock.pause_at(60_000)  # from here on time goes as we say, so that the page can be drawn between two steps
    page.locator("label", has_text="Side by side").click()
    page.get_by_label("Prompt").fill(QUESTION)
    page.get_by_label("Prompt").press("Enter")
    for _ in range(MOST_TURNS):
        page.wait_for_timeout(20)
        page.clock.run_for(80)
        told = page.locator(".status").all_inner_texts()
        if told and until in told[-1]:
            break
    else:
        raise UsageError(f"the page never said {until!r}; its panels say {told}")
    page.wait_for_timeout(400)
    page.evaluate("document.getAnimations().forEach((one) => one.finish())")
    page.screenshot(path=path)
    page.close()


@click.command(cls=ReportingCommand, help=(__doc__ or "").replace("    python", "\b\n    python", 1))
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where the PNGs go.")
@click.option("--browser", "program", metavar="FILE", help="A Chromium.  [default: the one on the PATH]")
def main(out: Path, program: str | None) -> None:
    """See the module."""
    from playwright.sync_api import sync_playwright

    found = program or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise UsageError("no chromium on the PATH; name one with --browser")
    out.mkdir(parents=True, exist_ok=True)
    with served(ENGINE) as url, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        draw(browser, url, out / "page-light.png", scheme="light", until="tokens in")
        draw(browser, url, out / "page-dark.png", scheme="dark", until="block 2, step 6")
        browser.close()


if __name__ == "__main__":
    main()
