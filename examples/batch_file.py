"""Answers a file of prompts, one a line, several at a time; writes one JSON object for each as it is finished.

python examples/batch_file.py PROMPTS ANSWERS [MODEL]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from offload_engine import Engine, SamplingParams

TOGETHER = 4
"""Prompts denoised in one forward: they share the experts that are fetched for it."""


def main(source: str, target: str, model: str | None = None) -> None:
    """Read, answer, write."""
    prompts = Path(source).read_text(encoding="utf-8").splitlines()
    params = SamplingParams(max_new_tokens=256)
    with (
        Engine.from_pretrained(model, gpu_mem="8GB", batch_size=TOGETHER) as engine,
        Path(target).open("w", encoding="utf-8") as answers,
    ):
        for number, done in engine.complete(prompts, params):
            answer = {"line": number + 1, "answer": done.text, "finish_reason": done.finish_reason}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        print(engine.stats.summary_line(), file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:4])
