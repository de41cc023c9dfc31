"""What all tests share."""

import pytest
import torch

# a worker per core, each with one thread: the tensors here are too small to share
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)
