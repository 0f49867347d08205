"""LLaDA2-MoE once more, in float64 and as plain as can be (REFERENCE §1 to §3); shares no code with ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class ReferenceModel:
    """One block-causal forward over a whole sequence, from a checkpoint's config.json and split-layout tensors."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.c = config
        self.w = {name: tensor.double() for name, tensor in tensors.items()}
        self.chosen: list[list[dict[int, float]]] = []
        """Per MoE layer and token: expert -> weight."""

    def logits(self, ids: list[int], block: int, dmoe: tuple[float, int] | None = None) -> Tensor:
        """[T, vocab]; `dmoe` is (top_p, min_experts), None for original routing."""
        self.chosen = []
        c = self.c
        h = self.w["model.word_embeddings.weight"][ids]
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            h = h + self.attention(at + "attention.", self.norm(h, at + "input_layernorm"), block)
            x = self.norm(h, at + "post_attention_layernorm")
            if layer < c.get("first_k_dense_replace", 0):
                h = h + self.swiglu(x, at + "mlp.")
            else:
                h = h + self.moe(x, at + "mlp.", block, dmoe)
        head = "model.word_embeddings.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
        return self.norm(h, "model.norm") @ self.w[head].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x * x).mean(-1, keepdim=True) + self.c.get("rms_norm_eps", 1e-6)
        return x / scale.sqrt() * self.w[name + ".weight"]

    def swiglu(self, x: Tensor, at: str) -> Tensor:
        gate, up, down = (self.w[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
        g = x @ gate.T
        return (g * torch.sigmoid(g) * (x @ up.T)) @ down.T

    def rope(self, x: Tensor, position: int) -> Tensor:
        """One head vector [d]: dims i and i + r/2 turn together, for the first r dims."""
        r = int(x.shape[-1] * self.c.get("partial_rotary_factor", 1.0))
        out = x.clone()
        for i in range(r // 2):
            angle = position / self.c["rope_theta"] ** (2 * i / r)
            a, b = x[i], x[i + r // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + r // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attention(self, at: str, x: Tensor, block: int) -> Tensor:
        c, tokens = self.c, x.shape[0]
        heads, kv_heads, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        fused = x @ self.w[at + "query_key_value.weight"].T
        if c.get("use_qkv_bias"):
            fused = fused + self.w[at + "query_key_value.bias"]
        q, k, v = fused.view(tokens, -1, d).split((heads, kv_heads, kv_heads), dim=1)
        if c.get("use_qk_norm", True):
            q, k = self.norm(q, at + "query_layernorm"), self.norm(k, at + "key_layernorm")
        q = torch.stack([torch.stack([self.rope(vector, t) for vector in q[t]]) for t in range(tokens)])
        k = torch.stack([torch.stack([self.rope(vector, t) for vector in k[t]]) for t in range(tokens)])
        out = torch.zeros(tokens, heads, d, dtype=torch.float64)
        for t in range(tokens):
            end = min(tokens, (t // block + 1) * block)
            for head in range(heads):
                shared = head // (heads // kv_heads)
                weights = torch.softmax(k[:end, shared] @ q[t, head] / math.sqrt(d), 0)
                out[t, head] = weights @ v[:end, shared]
        result = out.reshape(tokens, -1) @ self.w[at + "dense.weight"].T
        return result + self.w[at + "dense.bias"] if c.get("use_bias") else result

    def moe(self, x: Tensor, at: str, block: int, dmoe: tuple[float, int] | None) -> Tensor:
        c = self.c
        s = torch.sigmoid(x @ self.w[at + "gate.weight"].T)
        r = s + self.w[at + "gate.expert_bias"] if c.get("moe_router_enable_expert_bias", True) else s
        out = torch.zeros_like(x)
        per_token: list[dict[int, float]] = []
        for start in range(0, x.shape[0], block):
            rows = range(start, min(start + block, x.shape[0]))
            allowed = self.coreset([r[t].tolist() for t in rows], *dmoe) if dmoe else set(range(c["num_experts"]))
            for t in rows:
                chosen = self.choose(r[t].tolist(), allowed)
                total = sum(float(s[t, e]) for e in chosen)
                weights = {e: float(s[t, e]) / total * c["routed_scaling_factor"] for e in chosen}
                per_token.append(weights)
                for e, weight in weights.items():
                    out[t] += weight * self.swiglu(x[t], f"{at}experts.{e}.")
        self.chosen.append(per_token)
        return out + self.swiglu(x, at + "shared_experts.") if c.get("num_shared_experts") else out

    def coreset(self, rows: list[list[float]], p: float, least: int) -> set[int]:
        votes = dict.fromkeys(range(self.c["num_experts"]), 0.0)
        for row in rows:
            for e in sorted(votes, key=lambda e: (-row[e], e))[: self.c["num_experts_per_tok"]]:
                votes[e] += row[e]
        total = sum(votes.values())
        ranked = sorted(votes, key=lambda e: (-votes[e], e))
        kept: list[int] = []
        running = 0.0
        for e in ranked:
            if running > p:
                break
            kept.append(e)
            running += votes[e] / total
        return set(kept) | set(ranked[:least])

    def choose(self, row: list[float], allowed: set[int]) -> list[int]:
        c = self.c
        groups, keep = c.get("n_group", 1), c.get("topk_group", 1)
        size = c["num_experts"] // groups

        def score(group: int) -> float:
            inside = [row[e] if e in allowed else -math.inf for e in range(group * size, (group + 1) * size)]
            return sum(sorted(inside)[-2:])

        kept = sorted(range(groups), key=lambda g: (-score(g), g))[: keep if groups > 1 else 1]
        candidates = [e for e in sorted(allowed) if e // size in kept]
        return sorted(candidates, key=lambda e: (-row[e], e))[: c["num_experts_per_tok"]]
