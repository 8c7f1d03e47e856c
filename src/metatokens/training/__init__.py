"""Pre-training: the loop, its processes, checkpoints and run folder."""
