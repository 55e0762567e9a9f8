"""What a student is distilled with: one file a family of losses, named as in the papers."""
