"""Parity: numbers, limits, verdicts, and where a deviation begins."""
