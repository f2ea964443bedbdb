"""One page of any results: `python -m experiments.report`."""
