"""Which dimensions must be cut together, and the cut."""
