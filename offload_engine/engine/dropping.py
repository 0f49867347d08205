"""What becomes of an engine that was never closed, and that nobody can reach any more."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.engine.assembly import Parts


def dropped(name: str, parts: Parts, caches: Sequence[PrefixCache]) -> None:
    """Warn, and have its threads joined and its memory freed.

    By another thread: garbage is collected between any two instructions of any thread, one of the engine's own readers
    among them, which can't join itself and may hold the locks that closing takes.
    """
    warnings.warn(
        f"the engine of {name} was dropped without close(); use it in a with block", ResourceWarning, stacklevel=2
    )

    def free() -> None:
        try:
            parts.close()
        finally:
            parts.model.to("meta")
            for cache in caches:
                cache.release()

    threading.Thread(target=free, name="engine-closer", daemon=True).start()
