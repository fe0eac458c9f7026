"""Ways in: each turns what a user has into a captured model."""
