"""Where the score went and why; what can be cut."""
