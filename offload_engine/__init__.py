"""offload_engine: memory-constrained inference for Mixture-of-Experts diffusion language models."""
