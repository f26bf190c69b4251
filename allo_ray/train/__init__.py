"""One training loop for every method: packed batches, exact resume, Ray Train and DeepSpeed around it."""
