"""The constraint graph: which slices of which axes can go, and the program without them."""
