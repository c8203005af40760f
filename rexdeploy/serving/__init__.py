"""Serving: Triton repositories, the server, and the front that stands before it."""
