"""Training: state, step, losses, optimizer, sharding, checkpoints and reports."""
