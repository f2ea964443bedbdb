"""A study's run: its settings, its results, its checkpoints, and how it stops."""
