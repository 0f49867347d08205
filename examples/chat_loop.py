"""A conversation at the terminal: each answer is shown as its blocks are finished.

python examples/chat_loop.py [MODEL]          # the built-in model where none is named
"""

from __future__ import annotations

import sys

from offload_engine import Engine, Message, SamplingParams


def main(model: str | None = None) -> None:
    """Ask and answer until the input ends."""
    params = SamplingParams(max_new_tokens=256)
    conversation: list[Message] = []
    with Engine.from_pretrained(model, gpu_mem="8GB") as engine:
        for line in sys.stdin:
            conversation.append(Message(role="user", content=line.strip()))
            answer = ""
            for event in engine.stream(conversation, params):
                print(event.text, end="", flush=True)
                answer += event.text
            print()
            conversation.append(Message(role="assistant", content=answer))


if __name__ == "__main__":
    main(*sys.argv[1:2])
