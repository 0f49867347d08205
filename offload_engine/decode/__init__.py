"""Block-diffusion decoding: from prompt ids to answer ids, one denoising step at a time."""
