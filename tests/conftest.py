"""Steady tests: one thread each, no deadlines on a shared machine, the same examples each time."""

import pytest
import torch
from hypothesis import settings

from paredown.runtimes import RUNTIMES, ready
from paredown.types import UserError

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
