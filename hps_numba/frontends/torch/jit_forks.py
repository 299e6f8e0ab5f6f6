"""The threads of ``torch.jit.fork``, and the end of a process that used them.

A scripted model may look up in ``torch.jit.fork``, as HugeCTR's do. A thread of Torch then drops its last references to keys
and rows, a moment after the answer is there. An operator in Python has seen them, so Torch needs the interpreter for that; if
it is being finalized at that moment, the process aborts (``terminate called without an active exception``), when all its work
was done. So these threads are met once
before that.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings

import torch

__all__ = ["note_thread"]

_main = threading.main_thread().ident  # of the process that imported this; in a forked child it may be another thread
_processes: set[int] = set()  # those in which another thread than the main one ran an operator


def note_thread() -> None:
    """An operator runs in this thread."""
    if threading.get_ident() != _main and threading.get_ident() != threading.main_thread().ident:
        _processes.add(os.getpid())


def _meet(arrived: torch.Tensor, place: int, count: int) -> int:
    arrived[place] = 1
    while int(arrived.sum()) < count:  # in TorchScript, which does not hold the interpreter
        pass
    return count


def _meet_all(count: int) -> int:
    arrived = torch.zeros([count], dtype=torch.int32)
    tasks = torch.jit.annotate(list[torch.jit.Future[int]], [])
    for place in range(count):
        tasks.append(torch.jit.fork(_meet, arrived, place, count))
    for task in tasks:
        torch.jit.wait(task)
    return count


@atexit.register
def _finish() -> None:
    """Wait until every thread is done with what it ran before: each takes one of as many tasks."""
    if os.getpid() not in _processes:
        return  # also in a forked child, which does not have these threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(_meet_all)(torch.get_num_interop_threads())
