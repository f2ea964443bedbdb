"""The only files that know a library of modules."""
