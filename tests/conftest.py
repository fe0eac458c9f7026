"""Steady tests: one thread each, no deadlines on a shared machine, the same examples each time."""

import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import settings

from paredown.core.errors import UserError
from paredown.targets.runtimes import RUNTIMES, ready
from tests.architectures.captured import FOLDER

os.environ["PAREDOWN_CACHE"] = "off"
CAPTURES = pytest.StashKey[str]()
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


def pytest_configure(config):
    """One folder of captured architectures for this run, in the environment of its workers."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = config.stash[CAPTURES] = tempfile.mkdtemp(prefix="captures-")


def pytest_unconfigure(config):
    shutil.rmtree(config.stash.get(CAPTURES, ""), ignore_errors=True)
