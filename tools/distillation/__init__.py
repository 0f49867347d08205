"""Self-distillation data: a model's own answers to a set of prompts, in shards (REFERENCE §4)."""
