"""Trains networks: examples, a step, a run that goes on, several processes as one."""
