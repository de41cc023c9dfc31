"""What all tests share."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

# a worker per core, each with one thread, and so the processes that tests start: the tensors here are too small to share
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The environment as it was: with ranks that Lightning leaves there, a command that runs later waits for other processes."""
    with mock.patch.dict(os.environ):
        yield
