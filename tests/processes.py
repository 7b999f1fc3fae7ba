"""Two gloo processes for the tests of DDP and FSDP2."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2

in_processes = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch is built without gloo"),
]
"""Marks of a test that starts processes."""

needs_fsdp2 = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="FSDP2 on the CPU needs torch >= 2.9"
)


def in_two_processes(folder: Path, work) -> None:
    """Run ``work(rank)`` in two processes; what fails there fails here."""
    mp.spawn(_process, args=(str(folder), work), nprocs=WORLD)


def _process(rank: int, folder: str, work) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    work(rank)
    dist.barrier()
    # DDP keeps gloo's threads alive past destroy_process_group, and a thread that still lets go of a Python hook
    # while the interpreter is torn down aborts the process. Work that is done leaves without the teardown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
