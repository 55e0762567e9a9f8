"""Image sets: where images are, how they are decoded and augmented, and batches of them. It knows no model."""
