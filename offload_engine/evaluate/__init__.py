"""Evaluation: tasks and their grading, resumable runs of an engine, and the statistics of what came of them."""
