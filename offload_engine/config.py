"""How an engine is set up: its options, presets in TOML, and byte sizes as people write them.

GB is 10^9 bytes and GiB is 2^30; likewise KB, MB, TB and KiB, MiB, TiB. A bare letter (8G) means the decimal unit, the
smaller of its two readings, so that a budget is never exceeded for want of an i.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from offload_engine.errors import ConfigError

MAX_BYTES = 2**50
"""A size beyond this (1 PiB) is taken for a mistake."""
WANTED = "a size such as 8GB, 1.5GiB, 512MB or a whole number of bytes"

_SIZE = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})\s*([kmgt]i?b?|b|)\s*", re.IGNORECASE | re.ASCII)
_PREFIXES = "kmgt"


def bytes_of(value: Any) -> int:
    """The number of bytes `value` (int or str) says; raises `ValueError` with what was wanted for anything else."""
    if isinstance(value, str):
        parsed = _SIZE.fullmatch(value)
        if parsed is None:
            raise ValueError(f"wanted {WANTED}")
        count = int(Decimal(parsed[1]) * _unit(parsed[2].lower()))
    elif (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer()):
        count = int(value)
    else:
        raise ValueError(f"wanted {WANTED}")
    if count < 1:
        raise ValueError(f"wanted at least one byte: {WANTED}")
    if count > MAX_BYTES:
        raise ValueError(f"wanted at most 1 PiB: {WANTED}")
    return count


def parse_bytes(value: Any, option: str = "size") -> int:
    """As `bytes_of`, raising `ConfigError` that names `option` and the value found."""
    try:
        return bytes_of(value)
    except ValueError as error:
        raise ConfigError(f"{option} is {brief(value)}, {error}") from None


def format_bytes(count: int, *, round_up: bool = False) -> str:
    """Three significant digits and a decimal unit: '6.29 MB'. `round_up` never says less than `count`."""
    if count < 0:
        return "-" + format_bytes(-count)
    if count < 1000:
        return f"{count} B"
    scale = 10 ** (len(str(count)) - 3)
    lead = -(-count // scale) if round_up else (count + scale // 2) // scale
    digits = lead * scale  # three leading digits, possibly carried into a fourth
    power = min((len(str(digits)) - 1) // 3, len(_PREFIXES))
    whole = digits / 1000**power
    places = max(0, 2 - (len(str(digits)) - 1 - 3 * power))
    return f"{whole:.{places}f} {_PREFIXES[power - 1].upper()}B"


def brief(value: Any) -> str:
    """`repr`, on one line and not longer than a reader would want."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an int of thousands of digits
        text = "an enormous number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unit(suffix: str) -> int:
    if suffix in ("", "b"):
        return 1
    power = _PREFIXES.index(suffix[0]) + 1
    return int(1024**power if "i" in suffix else 1000**power)


_WORDS = ["device", "dtype", "routing", "eviction", "predictor", "hot_set", "tuned", "cuda_graphs", "verify"]
"""Fields that are words, whose case doesn't matter."""
_ALIASES = {
    "topk": "top-k",
    "des-s": "des-seq",
    "des-v": "des-vote",
    "capacity": "block-capacity",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
}


class EngineConfig(BaseModel):
    """Everything that decides how an engine runs; frozen. Fields are keywords of `Engine.from_pretrained`, keys of a
    TOML preset and options of the command line alike.

    Raises `ConfigError` for an unknown key, a wrong type, a value out of range and an impossible combination.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str | None = None
    """Directory of a checkpoint or its hub id; None is the built-in model."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")] = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What is computed in; auto is the checkpoint's own, or on a CPU, for fp16 and for small models, float32."""
    gpu_mem: int | Literal["auto"] = "auto"
    """Budget of fast memory in bytes: VRAM, or RAM of this process on a CPU-only machine."""
    host_mem: int | Literal["auto"] | None = "auto"
    """Budget of pinned host memory in bytes; None (in TOML and on the command line "none"): no host tier."""
    expert_mem: int | None = None
    """Cap on the expert slots alone, in bytes; None: whatever `gpu_mem` leaves."""
    max_context: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Positions the KV cache holds, prompt and answer together; None: the planner decides."""
    routing: Annotated[str, Field(min_length=1)] | None = None
    """original, top-k, dmoe, des-seq, des-vote or block-capacity; None is the checkpoint's own: dmoe if it was
    distilled for it, block-capacity if it names an `expert_capacity`, else original.
    """
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """dMoE: share of a block's votes its coreset passes; None: the checkpoint's `core_threshold`, else 0.6."""
    min_experts: Annotated[int, Field(ge=1, le=65536)] | None = None
    """dMoE: smallest coreset; None: the checkpoint's `core_min_experts`, else 16."""
    top_k_experts: Annotated[int, Field(ge=1, le=65536)] = 4
    """top-k: experts per token."""
    des_k: Annotated[int, Field(ge=1, le=65536)] = 2
    """DES-Seq: experts each token brings into its block's coreset."""
    des_beta: Annotated[float, Field(gt=0, le=1)] = 0.15
    """DES-Vote: share of a layer's experts that a block's coreset keeps."""
    expert_capacity: Annotated[int, Field(ge=1, le=65536)] | None = None
    """block-capacity: experts of a block's coreset; None: the checkpoint's `expert_capacity`, else 48."""
    residency_bonus: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """dMoE: how much more the votes for experts in fast memory count when a coreset is chosen. Above 0 an answer
    depends on what the cache holds, and is no longer that of a run with everything in memory.
    """
    hold_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """dMoE: denoising steps of a block that one coreset serves; 1: chosen in every step."""
    eviction: Literal["lru", "lfu", "score-aware", "next-use"] = "next-use"
    """Which resident expert makes room."""
    predictor: Literal["previous-step", "block-history", "cross-layer-gate", "combined", "none"] = "combined"
    """What guesses a layer's experts before its router has spoken; none: nothing is prefetched."""
    prefetch_depth: Annotated[int, Field(ge=0, le=64)] = 2
    """MoE layers to prefetch ahead; 0: nothing is prefetched."""
    hot_set: Literal["on", "off"] = "on"
    """Whether the experts used most are remembered with the checkpoint, to fill free slots at the next start; the
    built-in model, which is small, does without.
    """
    tuned: Literal["on", "off"] = "on"
    """Whether a `gpu_mem` of "auto", and options that move experts and were left alone, follow what `dmoe tune` found
    for this model on this device.
    """
    transfers_in_flight: Annotated[int, Field(ge=1, le=2)] = 2
    """Transfers started and not finished; more would only delay a demand load that comes after them."""
    cpu_experts: Literal["off", "auto"] | Annotated[float, Field(ge=0, le=1)] = "off"
    """Beside a GPU: missing experts that the CPU computes from host memory while others are copied. auto: as many as
    make the layer end soonest, by measured times; a number: that share of them, whatever it costs. Where it is not off,
    what is in fast memory decides how an expert's output is rounded.
    """
    reader_threads: Annotated[int, Field(ge=1, le=64)] = 2
    """Threads that read experts from disk."""
    verify: Literal["first", "always", "never"] = "first"
    """When an expert of a converted checkpoint is held against its checksum: when read first, always, or never."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Whether a GPU replays attention and routers of a block's denoising steps as recorded in one of them. auto: until
    CUDA refuses, or what was recorded differs in one bit; on: that is an error.
    """
    prefill_chunk: Annotated[int, Field(ge=1, le=2**20)] = 512
    """Prompt tokens that attend together in a prefill; rounded to whole blocks by the engine."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Prompts answered together; each has a KV cache of its own in the memory plan."""
    lanes_together: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Of these, how many share forwards; auto: as many as the expert cache serves, by what their blocks used lately."""
    prefix_reuse: Literal["auto", "on", "off"] = "auto"
    """Whether a prompt begins with the keys and values that an earlier one left of the blocks that it shares with it;
    auto: where requests go through a `Batcher`, but not in `generate` and `stream`, whose answers then do not depend,
    not even in the last bit, on what was asked before.
    """
    fused_commit: bool = True
    """A finished block is committed in the first denoising step of the next one, which saves a forward per block."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Compute threads; None: torch's choice, or one for a small model."""
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    """Overrides the checkpoint's mask id."""
    eos_token_id: Annotated[int, Field(ge=0)] | None = None
    """Overrides the checkpoint's eos id."""

    @field_validator("gpu_mem", "host_mem", "expert_mem", mode="before")
    @classmethod
    def _size(cls, value: Any, info: ValidationInfo) -> Any:
        words = {"gpu_mem": ("auto",), "host_mem": ("auto", "none"), "expert_mem": ("none",)}[info.field_name or ""]
        word = value.strip().lower() if isinstance(value, str) else None
        if word in words:
            return None if word == "none" else word
        if value is None and "none" in words:
            return None
        try:
            return bytes_of(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {' or '.join(map(repr, words))}") from None

    @field_validator("cpu_experts", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        """A word or a number, which on the command line is text as well."""
        text = value.strip().lower() if isinstance(value, str) else value
        if text in ("off", "auto"):
            return text
        try:
            share = float(text) if not isinstance(text, bool) else -1.0
        except (TypeError, ValueError):
            share = -1.0
        if not 0 <= share <= 1:
            raise ValueError("wanted 'off', 'auto' or a share of the missing experts from 0 to 1")
        return share

    @field_validator("model", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(text, str) and not text.strip():
            raise ValueError("wanted a directory or a hub id")
        return text

    @field_validator("lanes_together", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any) -> Any:
        """The command line has nothing but text."""
        word = value.strip().lower() if isinstance(value, str) else value
        return int(word) if isinstance(word, str) and word.isdecimal() else word

    @field_validator(
        "device",
        "dtype",
        "routing",
        "eviction",
        "predictor",
        "hot_set",
        "prefix_reuse",
        "tuned",
        "cuda_graphs",
        "verify",
        mode="before",
    )
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        """Case and underscores don't matter: Top_K and topk are top-k."""
        if type(value).__module__ == "torch":  # torch.float32, torch.device("cpu")
            value = str(value).removeprefix("torch.")
        if not isinstance(value, str):
            return value
        word = value.strip().lower().replace("_", "-")
        return _ALIASES.get(word, word)

    @model_validator(mode="wrap")
    @classmethod
    def _named_errors(
        cls, values: Any, handler: ModelWrapValidatorHandler[EngineConfig], info: ValidationInfo
    ) -> EngineConfig:
        file = (info.context or {}).get("file")
        try:
            config = handler(values)
        except ValidationError as error:
            raise _complaint(error, f"{file}: option" if file else "engine option") from None
        if file is None:  # a file may be completed by keywords, so it isn't judged alone
            config._refuse_impossible()
        return config

    def _refuse_impossible(self) -> None:
        if isinstance(self.gpu_mem, int) and self.expert_mem is not None and self.expert_mem > self.gpu_mem:
            raise ConfigError(
                f"expert_mem is {format_bytes(self.expert_mem)}, but gpu_mem, which holds it, is "
                f"{format_bytes(self.gpu_mem)}; lower expert_mem or leave it out"
            )
        if self.device == "cpu" and isinstance(self.host_mem, int):
            raise ConfigError(
                f"host_mem is {format_bytes(self.host_mem)}, but there is no host tier on a CPU-only machine "
                f"(device is 'cpu'); leave host_mem out and give the memory to gpu_mem, which is RAM there"
            )

    @classmethod
    def build(cls, file: Path | None = None, **overrides: Any) -> EngineConfig:
        """Keywords over the preset `file` over the defaults; a keyword that is None leaves the value as it was."""
        values = load_config(file) if file is not None else {}
        known = cls.model_fields.keys()
        values |= {key: value for key, value in overrides.items() if value is not None or key not in known}
        return cls(**values)


def presets() -> dict[str, Path]:
    """The presets that come with the package, by name."""
    here = Path(__file__).parent
    folder = here / "configs"  # of an installed package; a checkout has them beside it
    if not folder.is_dir() and (here.parent / "pyproject.toml").is_file():
        folder = here.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def load_config(path: Path) -> dict[str, Any]:
    """The options a TOML preset sets, checked one by one and normalised (sizes in bytes).

    `path` may also be a name of `presets`, where there is no such file. Raises `ConfigError` that names the file, and
    the line or the key.
    """
    if not path.exists():
        path = presets().get(str(path), path)
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: not found; wanted a TOML file of engine options, or one of {', '.join(presets()) or 'no presets'}"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory; wanted a TOML file of engine options") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; wanted a TOML file, which is UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid TOML: {reason}") from None
    checked = EngineConfig.model_validate(values, context={"file": path})
    return checked.model_dump(exclude_unset=True)


def _complaint(error: ValidationError, what: str) -> ConfigError:
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][0])
        near = difflib.get_close_matches(key.lower().replace("-", "_"), EngineConfig.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(EngineConfig.model_fields)}"
        return ConfigError(f"{what}: unknown key {key!r}; {hint}")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "wanted", 1)
    if first["type"] == "string_pattern_mismatch":
        reason = "wanted auto, cpu, cuda or cuda:N"  # only the device has a pattern
    name = ".".join(str(part) for part in first["loc"])
    return ConfigError(f"{what} {name!r}: found {brief(first['input'])}, {reason[0].lower()}{reason[1:]}")
