"""Steady tests: one thread each, no deadlines on a shared machine, the same examples each time."""

import os

import pytest
import torch
from hypothesis import settings

from paredown.core.errors import UserError
from paredown.targets.runtimes import RUNTIMES, ready

os.environ["PAREDOWN_CACHE"] = "off"
torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(params=RUNTIMES)
def runtime_name(request):
    """Each runtime in turn; skipped where it is not installed."""
    try:
        ready(request.param)
    except UserError as error:
        pytest.skip(str(error))
    return request.param
