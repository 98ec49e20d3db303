"""A process of its own for each GPU of a case; used by bench_train.py."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from moba_train.config import Config
from moba_train.parallel import local, variables
from moba_train.parallel.lifetime import follow_parent
from moba_train.runtime import finish, start


def apart(work: Callable, *arguments: Any, gpus: int = 1) -> Any:
    """``work(*arguments, runtime)`` in fresh processes, one a GPU.

    Returns:
        What rank 0 returned; None where a process ended without a result, which has told why.
    """
    context = multiprocessing.get_context("spawn")  # forked, it would wait for OpenMP threads that it does not have
    receiver, sender = context.Pipe(duplex=False)
    master = (local.HOST, local.free_port())
    processes = [
        context.Process(
            target=_alone,
            args=(variables.of_rank(rank, rank, gpus, gpus, master), None if rank else sender, work, arguments),
        )
        for rank in range(gpus)
    ]
    for process in processes:
        process.start()
    sender.close()
    try:
        # A rank that ends would have the others wait for it in a collective.
        while receiver not in (ready := wait([receiver, *(each.sentinel for each in processes)])):
            if any(each.exitcode for each in processes):
                return None
            processes = [each for each in processes if each.sentinel not in ready]
        return receiver.recv()
    except EOFError:
        return None
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def _alone(environment: dict[str, str], sender: Connection | None, work: Callable, arguments: tuple[Any, ...]) -> None:
    follow_parent()
    os.environ.update(environment)
    found = work(*arguments, start(Config().launch))
    if sender is not None:
        sender.send(found)
    finish()
