"""For all tests and doctests: XLA leaves out its dearest passes, and Python collects garbage rarely."""

import gc

from tests.support.quick import compile_quickly

compile_quickly()
# Tracing makes many objects that stay: to look through them at Python's usual rate takes a tenth of the time.
gc.set_threshold(20_000, 20, 50)
