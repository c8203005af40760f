"""A bundle: the folder that holds a network, what was made of it, and how each follows."""
