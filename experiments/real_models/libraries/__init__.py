"""Builders of models, one file for each library."""
