"""The data sets of the studies."""
