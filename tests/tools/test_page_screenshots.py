"""The documentation's pictures of the page can be drawn again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.page_screenshots import main

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the PATH: nothing can be drawn")
def test_two_small_pictures(tmp_path: Path):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    ran = CliRunner().invoke(main, ["--out", str(tmp_path / "images")])
    assert ran.exit_code == 0, ran.output
    pictures = sorted((tmp_path / "images").iterdir())
    assert [one.name for one in pictures] == ["page-dark.png", "page-light.png"]
    for one in pictures:
        assert one.read_bytes().startswith(PNG)
        assert 20_000 < one.stat().st_size < 300_000


def test_without_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    ran = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert ran.exit_code == 2
    assert "name one with --browser" in ran.stderr
