"""Detection: from a torch detector to the graphs that run it."""
