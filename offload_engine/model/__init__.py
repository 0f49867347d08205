"""LLaDA2-MoE: the network, which knows nothing of offloading."""
