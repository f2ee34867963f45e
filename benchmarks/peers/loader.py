"""One loader of another project, which delivers batches for as long as it is told to.

    python -m benchmarks.peers.loader NAME KIND ORDER FOLDER

NAME is a function of `benchmarks.peers.loaders`, KIND `tokens` or `images`, ORDER `sequential` or `shuffled`, FOLDER
what `benchmarks.peers.write` has made. Prints a JSON line when the first batch has come, and then one for each line of
input, which is a number of seconds. Runs in the environment of the peers, without railbus.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def endless(epoch: Callable[[], Iterator[int]]) -> Iterator[int]:
    """Sizes of batches, epoch after epoch; each is counted after it has been delivered."""
    while True:
        yield from epoch()


def serve(epoch: Callable[[], Iterator[int]], *, began: float) -> None:
    """Tell the time to the first batch, then the speed for as long as asked; `began` is of `time.perf_counter`."""
    batches = endless(epoch)
    next(batches)
    print(json.dumps({"first_batch_s": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        limit_s, samples, began = float(line), 0, time.perf_counter()
        elapsed_s = 0.0
        while elapsed_s < limit_s:
            samples += next(batches)
            elapsed_s = time.perf_counter() - began
        print(json.dumps({"samples": samples, "seconds": elapsed_s}), flush=True)


def main() -> None:
    name, kind, order, folder = sys.argv[1:5]
    import torch  # the peers' users have it imported as well

    torch.set_num_threads(1)
    began = time.perf_counter()
    from benchmarks.peers import loaders

    make: Any = getattr(loaders, name)
    serve(make(Path(folder), kind, is_shuffled=order == "shuffled"), began=began)


if __name__ == "__main__":
    main()
