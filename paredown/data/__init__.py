"""Splits: read in batches, fed to a model, scored, observed."""
