"""The site builds without a warning, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.docs.documents import ROOT

pytest.importorskip("material", reason="the site needs mkdocs-material (extra docs)")


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", page.read_text(encoding="utf-8")):
            fetched = re.search(r"(?:src|href)=\"?(https?://[^\s\">]+)", tag)
            assert fetched is None or 'rel="canonical"' in tag, f"{page.name}: {tag}"
