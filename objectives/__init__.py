"""What is trained: one file an objective, one row each in the registry."""
