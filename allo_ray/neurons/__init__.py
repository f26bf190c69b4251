"""Neurons: which scalar weights matter, training only those, and storing what changed as a sparse delta."""
