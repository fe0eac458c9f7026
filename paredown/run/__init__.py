"""Apply, measure, keep or undo, and remember."""
