"""Studies of pruning: `python -m experiments.<study>`."""
