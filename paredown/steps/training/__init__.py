"""Training what compression has changed."""
