"""What a training step takes, counted before it runs: parameters, memory by part, FLOPs."""
