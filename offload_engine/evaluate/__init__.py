"""Evaluation: tasks, grading, statistics, and runs of an engine over them."""
