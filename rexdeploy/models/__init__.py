"""The networks: their PyTorch code, their published figures, and their checkpoints."""
