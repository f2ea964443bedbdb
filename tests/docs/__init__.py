"""The pages run."""
