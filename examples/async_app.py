"""An engine inside an asyncio program: the loop stays free, answers can be cancelled, the cache is resized between two.

python examples/async_app.py [MODEL]
"""

from __future__ import annotations

import asyncio
import sys

from offload_engine import AsyncEngine, SamplingParams

QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"


async def heartbeat() -> None:
    """What the rest of the program does meanwhile."""
    while True:
        await asyncio.sleep(0.05)
        print(".", end="", flush=True)


async def main(model: str | None = None) -> None:
    """Ask with a deadline, then again with half of the cache."""
    params = SamplingParams(max_new_tokens=256)
    async with await AsyncEngine.from_pretrained(model, gpu_mem="8GB") as engine:
        pulse = asyncio.create_task(heartbeat())
        async for event in engine.stream(QUESTION, params):
            print(event.text, end="", flush=True)
        try:
            async with asyncio.timeout(0.01):
                await engine.generate(QUESTION, params)
        except TimeoutError:  # the engine is free again
            print("\nno answer within 10 ms")
        half = engine.engine.plan.expert_slots // 2
        plan = await engine.run(lambda held: held.resize(expert_mem=half))
        done = await engine.generate(QUESTION, params)
        pulse.cancel()
        print(f"\nwith {plan.slots} expert slots: {done.text}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:2]))
