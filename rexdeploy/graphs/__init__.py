"""ONNX graphs: read, made from torch, wrapped, cast to 16 bits, and taken apart in blocks."""
