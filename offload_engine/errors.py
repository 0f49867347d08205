"""Every failure a user can meet, one class per kind.

A message is one line (a table may follow it): it names the thing, the value found, the value wanted, and the way out.
`exit_code` is what `dmoe-run` and `dmoe` exit with: 2 for usage, 3 for a model that can't be loaded, 4 for memory,
1 otherwise.
"""

from __future__ import annotations


class OffloadError(Exception):
    """Base of all errors that offload_engine raises on purpose."""

    exit_code = 1


class UsageError(OffloadError):
    """An argument, option or request that can't be honoured as given."""

    exit_code = 2


class ConfigError(UsageError):
    """An engine configuration with an unknown key, a wrong type, or an impossible combination."""


class PromptError(UsageError):
    """A prompt that can't be used: undecodable, too long, or with ids outside the vocabulary."""


class ModelError(OffloadError):
    """A model that can't be loaded."""

    exit_code = 3


class CheckpointError(ModelError):
    """A checkpoint whose files are missing, damaged, or disagree with its own config."""


class HubError(ModelError):
    """A model that could be neither found locally nor fetched from the hub."""


class TokenizerError(ModelError):
    """A tokenizer or chat template that can't be used with its model."""


class MemoryBudgetError(OffloadError):
    """A memory budget that can't be met; the message ends with the plan's table."""

    exit_code = 4


class DeviceError(OffloadError):
    """A device that is absent or can't do what was asked of it."""

    exit_code = 4


class TransferError(OffloadError):
    """An expert that could not be brought into fast memory."""


class TraceError(OffloadError):
    """A routing trace that can't be written or read."""


class TraceWriteError(TraceError):
    """A routing trace that the system takes no further writes for, such as one on a full disk."""


class QueueFullError(OffloadError):
    """As many requests wait as may."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which a place is likely to be free."""


class EngineClosedError(OffloadError):
    """The engine was used after `close()`."""


class InternalError(OffloadError):
    """A broken invariant of ours: a defect in offload_engine, never the user's fault."""
