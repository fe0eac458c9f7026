"""The one representation: a captured graph, and what is done to it."""
