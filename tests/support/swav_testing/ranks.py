"""Run a function on several real gloo ranks."""

import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torchvision", "numpy"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo world and return the results by rank.

    The function must be importable by name; results are what ``torch.save`` takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        started = []
        for rank in range(world_size):
            here, there = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_rank, args=(there, store, rank, world_size, function, args))
            process.start()
            there.close()
            started.append((process, here))
        results, errors = [], []
        for rank, (_, pipe) in enumerate(started):
            try:
                error, payload = pipe.recv()
            except EOFError:
                error, payload = "the process died without a word", b""
            if error:
                errors.append(f"rank {rank}: {error}")
            else:
                results.append(torch.load(io.BytesIO(payload), weights_only=False))
        for process, _ in started:
            process.join(timeout=60)
            process.kill()
    if errors:
        raise RuntimeError("\n".join(errors))
    return results


def _rank(
    pipe: Connection, store: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)
        pipe.send((None, buffer.getvalue()))
    except BaseException:
        pipe.send((traceback.format_exc(), b""))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
