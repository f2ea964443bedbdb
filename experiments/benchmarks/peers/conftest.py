"""Keeps doctests from importing what needs a library that is not installed."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["torch_sparsegpt.py"]
