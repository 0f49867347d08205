"""A checkpoint's config.json, read and checked (REFERENCE §1)."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from offload_engine.errors import CheckpointError
from offload_engine.routing import RouterShape

MODEL_TYPES = ("llada2_moe", "llada2_moe_veomni")

LONGEST_SHOWN = 80
"""Characters of a wrong value that an error repeats."""

Count = Annotated[int, Field(ge=1, le=2**24)]
"""A size; the bound keeps a lying config from asking for absurd allocations."""


class ModelConfig(BaseModel):
    """The architecture of one LLaDA2-MoE checkpoint. Fields are named as in config.json.

    `from_file` raises `CheckpointError` naming the key when one is missing, of the wrong type or not supported.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    num_experts: Annotated[int, Field(ge=1, le=65536)]
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    num_shared_experts: Annotated[int, Field(ge=0, le=1024)] = 0
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 0
    n_group: Count = 1
    topk_group: Count = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.5
    moe_router_enable_expert_bias: bool = True
    rms_norm_eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600000.0
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    rotary_dim: Annotated[int, Field(ge=2)] | None = None
    """Counts only where `partial_rotary_factor` is absent: the reference reads nothing but the factor."""
    max_position_embeddings: Count = 16384
    use_bias: bool = False
    use_qkv_bias: bool = False
    use_qk_norm: bool = True
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    score_function: Literal["sigmoid"] = "sigmoid"
    use_sliding_window: Literal[False] = False
    rope_scaling: None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    mode: str | None = None
    """`aggregate` in a checkpoint distilled for dMoE."""
    core_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """The coreset's top-p that a dMoE checkpoint was distilled with."""
    core_min_experts: Count | None = None
    """The smallest coreset that a dMoE checkpoint wants to be served with; ours, the published code fixes 16."""
    expert_capacity: Count | None = None
    """Experts a block may use, in a checkpoint that routes natively by block (LLaDA2.2; REFERENCE §2)."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.n_group > 1 and "topk_group" not in self.model_fields_set:
            raise ValueError(f"key 'topk_group' is missing, and n_group is {self.n_group}")
        if self.num_experts % self.n_group:
            raise ValueError(f"num_experts ({self.num_experts}) is no multiple of n_group ({self.n_group})")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) exceeds n_group ({self.n_group})")
        if self.num_experts_per_tok > self.num_experts // self.n_group * self.topk_group:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the experts in topk_group groups "
                f"({self.num_experts // self.n_group * self.topk_group})"
            )
        if self.rotary % 2 or self.rotary > self.head_dim:
            raise ValueError(f"rotary dimensions ({self.rotary}) must be even and at most head_dim ({self.head_dim})")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) exceeds "
                f"num_hidden_layers ({self.num_hidden_layers})"
            )
        return self

    @property
    def rotary(self) -> int:
        """Leading dimensions of each head that rotary embedding turns."""
        if self.rotary_dim is not None and "partial_rotary_factor" not in self.model_fields_set:
            return self.rotary_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that route; those before are dense."""
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts taken together; 0 where there are none."""
        return self.moe_intermediate_size * self.num_shared_experts

    @property
    def router(self) -> RouterShape:
        """What routing policies need to know of this model."""
        return RouterShape(
            num_experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            n_group=self.n_group,
            topk_group=self.topk_group,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
        )

    @property
    def distilled_top_p(self) -> float | None:
        """The coreset's top-p if the checkpoint was distilled for dMoE (0.6 where it doesn't say), else None."""
        if self.mode != "aggregate":
            return None
        return self.core_threshold if self.core_threshold is not None else 0.6

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a config.json."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; a checkpoint directory holds a config.json") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Any, source: str = "config") -> ModelConfig:
        """Check a parsed config.json; `source` names it in errors."""
        if not isinstance(raw, dict):
            raise CheckpointError(f"{source}: holds {type(raw).__name__}, wanted a JSON object")
        if raw.get("model_type") not in MODEL_TYPES:
            raise CheckpointError(
                f"{source}: model_type is {raw.get('model_type')!r}, but this engine runs {' and '.join(MODEL_TYPES)}"
            )
        try:
            return cls.model_validate(_with_derived_defaults(raw))
        except ValidationError as error:
            raise CheckpointError(f"{source}: {_complaint(error)}") from None


def _with_derived_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Nulls dropped (they mean *default*), newer spellings read, and the defaults that follow from other keys."""
    values = {key: value for key, value in raw.items() if value is not None}
    _read_rope(values)
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if heads is not None:
        values.setdefault("num_key_value_heads", heads)
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        values.setdefault("head_dim", hidden // heads)
    if values.get("n_group", 1) == 1:
        values["topk_group"] = 1
    for key in ("rope_theta", "routed_scaling_factor", "rms_norm_eps", "partial_rotary_factor"):
        if type(values.get(key)) is int:  # JSON writes 600000 for 600000.0
            with suppress(OverflowError):  # refused as it stands, then
                values[key] = float(values[key])
    return values


def _read_rope(values: dict[str, Any]) -> None:
    """Rotary settings may stand in a dictionary of their own; one that scales nothing is as good as none."""
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        del values["rope_scaling"]
    rope = values.pop("rope_parameters", {})
    if not isinstance(rope, dict):
        return
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            values.setdefault(key, rope[key])


def _complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if not key:
        return reason
    found = repr(first["input"])
    shown = found if len(found) <= LONGEST_SHOWN else f"{found[:LONGEST_SHOWN]}…"
    return f"key {key!r} is {shown}: {reason[0].lower()}{reason[1:]}"
