"""Training: the state, the step, and all that surrounds them."""
