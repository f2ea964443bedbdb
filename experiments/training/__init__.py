"""Training loops: whole epochs for all seeds, single steps, and distillation."""
