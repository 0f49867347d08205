"""docs/configuration.md is what the classes say."""

from __future__ import annotations

from offload_engine import EngineConfig, SamplingParams
from tools.document_config import PAGE, docstrings, page


def test_the_page_is_what_the_tool_writes_now():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tools.document_config"


def test_every_key_is_explained():
    for owner in (EngineConfig, SamplingParams):
        texts = docstrings(owner)
        assert [name for name in owner.model_fields if not texts.get(name)] == []
