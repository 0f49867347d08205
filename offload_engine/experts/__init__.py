"""Experts outside fast memory: where they live, which are here, and how the missing ones come."""
