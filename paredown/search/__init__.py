"""From goals to recipes."""
