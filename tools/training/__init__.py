"""Training of the built-in model, and of any LLaDA2-MoE checkpoint small enough: block diffusion (REFERENCE §4)."""
