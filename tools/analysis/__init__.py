"""Measures what block-level routing changes, and writes the paper's tables and figures for another checkpoint.

`python -m tools.analyse` is the way in.
"""
