"""For all tests and doctests: XLA leaves out its dearest passes, and Python collects garbage rarely."""

import gc

from tests.support.quick import compile_quickly

compile_quickly()
# Tracing makes many objects that stay: at the usual rate, a tenth of the time goes into looking through them.
gc.set_threshold(20_000, 10, 10)
