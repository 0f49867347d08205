"""Fine-tuning of a LLaDA2-MoE checkpoint under block-level routing on its own answers (REFERENCE §4)."""
