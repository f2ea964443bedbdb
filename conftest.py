"""For all tests and doctests: programs are compiled without XLA's dearest optimisations."""

from tests.support.quick import compile_quickly

compile_quickly()
