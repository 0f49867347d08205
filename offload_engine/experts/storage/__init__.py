"""Experts on disk: where each one's bytes lie, reading them, and writing them anew."""
