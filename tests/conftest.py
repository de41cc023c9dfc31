"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)
