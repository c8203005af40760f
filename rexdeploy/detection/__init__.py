"""Detectors: their graphs, and what is done before, between and after them."""
