"""Timing: networks and runtimes, side by side in interleaved rounds."""
