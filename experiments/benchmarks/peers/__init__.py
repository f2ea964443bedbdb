"""The same work in other libraries, each for a process of its own; no JAX in here."""
