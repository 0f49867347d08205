"""Searches, on recorded traces and a virtual clock, for the options that a budget is best spent with."""
