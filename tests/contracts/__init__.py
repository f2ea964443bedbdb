"""One table of public members, and the checks that all of them go through."""
