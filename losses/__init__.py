"""Distillation losses, one file a family, named as in the papers."""
