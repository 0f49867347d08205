"""Which checkpoint a run was made with, whatever it was called."""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECE = 2**16
PIECES = 256
"""Of a file larger than both together only this many pieces are read, spread evenly: fine-tuning moves all weights."""

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.safetensors", "*.packed")


def fingerprint(directory: Path) -> str:
    """A digest, 16 hexadecimal digits, of what decides a checkpoint's answers: config, tokenizer, weights."""
    digest = hashlib.sha256()
    for pattern in _FILES:
        for path in sorted(directory.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in _starts(size):
                    file.seek(start)
                    digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def _starts(size: int) -> list[int]:
    if size <= PIECE * PIECES:
        return list(range(0, size, PIECE))
    return [place * (size - PIECE) // (PIECES - 1) for place in range(PIECES)]
