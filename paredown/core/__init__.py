"""The nouns and what everything stands on; imports nothing of the other rooms."""
