"""A run's life: its command line, its folder, its progress and checkpoints, and how it ends."""
