"""Recorded routing through the real cache, eviction, predictor and scheduler, on a virtual clock."""
