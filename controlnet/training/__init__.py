"""The training loop and what it needs: optimizer, checkpoints, metrics, validation images, ranks, random streams."""
