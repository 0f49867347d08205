"""Checkpoints that several tests read and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import tiny_config, write_checkpoint
from tests.cli.command_line import write_speaking_checkpoint


@pytest.fixture(scope="session")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking_checkpoint(tmp_path_factory.mktemp("speaking") / "model")


@pytest.fixture(scope="session")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer."""
    config = tiny_config(max_position_embeddings=16384)
    return write_checkpoint(tmp_path_factory.mktemp("mute") / "model", config)
