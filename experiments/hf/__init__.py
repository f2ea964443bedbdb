"""Checkpoints of Hugging Face's layout: opened as a function of JAX and written back for other programs."""
