"""How much to prune: sensitivity analysis, and the search for a budget."""
