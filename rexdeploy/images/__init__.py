"""Images: decoded safely, and sets of them."""
