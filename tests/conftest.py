"""What every test shares: fixed random states, and derandomised property tests without deadlines."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("implicit", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("implicit")


@pytest.fixture(autouse=True)
def _fixed_random_state():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill what `empty` returns with NaN, so that reading memory that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_configure(config):
    """Torch scripts its own forward-mode decompositions when they are first used, and complains about it."""
    config.addinivalue_line("filterwarnings", r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
