"""LLaDA2.0-mini's architecture (REFERENCE §1), and smaller ones of the same make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offload_engine.model.config import ModelConfig

RAW: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "llada2-mini-config.json").read_text())


def mini(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(RAW | changes)
