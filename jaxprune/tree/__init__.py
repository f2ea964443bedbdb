"""Trees of params: their paths, their masks, and the checks of arguments."""
