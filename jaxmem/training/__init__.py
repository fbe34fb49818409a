"""Train step, optimiser, devices, loop, checkpoints, logging."""
