"""Answers to images: one classifier, streams of files, rows of results."""
