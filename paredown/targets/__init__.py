"""Where a file runs, and what is written for it."""
