"""Steady tests: one thread each, no deadlines on a shared machine, the same examples each time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
