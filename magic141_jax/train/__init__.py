"""Methods, optimizer, step, loop and checkpoints of training."""
