"""What all tests share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

# a worker per core, each with one thread: the tensors here are too small to share
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)
