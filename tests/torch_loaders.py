"""Torch's own loader in tests, whose workers are to end with the test that has started them.

An iterator that is garbage in a cycle, as where the traceback of an error holds it, is taken apart after its queues: it
then waits 5 s for each worker, in whatever test comes next.
"""

from __future__ import annotations

import gc
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


def taken(loader: DataLoader[Any]) -> list[Any]:
    """What it gives; its workers end with it, also where that is an error."""
    batches = iter(loader)
    try:
        return list(batches)
    finally:
        batches._shutdown_workers()  # type: ignore[attr-defined]  # of the kind of iterator that has workers


def end_workers() -> None:
    """End the workers of every loader that this process has started."""
    for one in gc.get_objects():
        if type(one) is _MultiProcessingDataLoaderIter:  # `isinstance` asks proxies for their class, and some warn
            one._shutdown_workers()
