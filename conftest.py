"""For all tests and doctests: programs are compiled without XLA's dearest optimisations.

Most of the time of the tests goes into compiling thousands of small programs. XLA_FLAGS of one's own
are left as they are.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
