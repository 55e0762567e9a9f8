"""Trained networks as files for other runtimes, and the proof that a file computes what the network does."""
