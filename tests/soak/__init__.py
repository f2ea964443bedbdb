"""Long commands; the tests run a small part of each."""
