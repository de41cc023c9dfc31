"""Processes that tests start.

Most are forked from a server that has imported torch, Lightning and ``lq``, which takes longer than what they do.
"""

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import start_processes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning.pytorch", "hydra.main", "lq.callbacks", "lq.cli.run"])


class ForkedDDP(DDPStrategy):
    """DDP whose ranks come from the server; as Lightning starts them there, all of them would train the same memory."""

    def __init__(self) -> None:
        super().__init__(start_method="forkserver")

    def setup_environment(self) -> None:
        for tensor in itertools.chain(self.lightning_module.parameters(), self.lightning_module.buffers()):
            tensor.data = tensor.data.clone()
        super().setup_environment()


def two_ranks() -> dict[str, Any]:
    """A Trainer's options for DDP in two processes."""
    return {"strategy": ForkedDDP(), "devices": 2}


def start_ranks(work: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """``work(rank, *args)`` in so many processes; their errors are raised here."""
    start_processes(work, args, nprocs=ranks, start_method="forkserver")


def environment() -> dict[str, str]:
    return os.environ | {"WANDB_SILENT": "true", "COLUMNS": "200"}


def launched(folder: Path, *args: str) -> CompletedProcess[str]:
    """``lq`` with ``args`` in ``folder``, in a new interpreter, which DDP needs to start the same command again."""
    told = [sys.executable, "-m", "lq", *args]
    return subprocess.run(told, cwd=folder, env=environment(), text=True, capture_output=True, check=False)


def command(folder: Path, *args: str) -> CompletedProcess[str]:
    """:func:`launched` without starting the interpreter."""
    with TemporaryDirectory() as place:
        files = [Path(place, name) for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_command, args=(folder, args, environment(), files))
        process.start()
        process.join()
        return CompletedProcess(args, process.exitcode, *(file.read_text() for file in files))


def _command(folder: Path, args: tuple[str, ...], env: dict[str, str], files: list[Path]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["lq", *args]
    from lq.cli import main

    main()
