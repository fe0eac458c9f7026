"""The guard: decides from what both models answered whether the candidate goes on, and knows
nothing of the network. Pure Python and NumPy; every clock is given."""
