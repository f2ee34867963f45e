"""Peers of a job's start: one optimizer step in this process, or in forks of it.

python benchmarks/one_step.py           import torch, take a step, print the time (ns) at its end
python -m benchmarks.one_step fork N    once warm, fork N times; print each time from fork to step (s)
"""

from __future__ import annotations

import os
import sys
import time


def step() -> None:
    """What `jobs/tiny.py` trains, without its data."""
    import torch

    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy(model(torch.ones(64, 64)), torch.zeros(64, dtype=torch.long))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def fork_s() -> float:
    """Seconds from before a fork until its child has taken a step."""
    read, write = os.pipe()
    began = time.perf_counter()
    if os.fork() == 0:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        step()
        os.write(write, b"1")
        os._exit(0)
    os.read(read, 1)
    seconds = time.perf_counter() - began
    os.wait()
    os.close(read)
    os.close(write)
    return seconds


def main() -> None:
    if sys.argv[1:2] != ["fork"]:
        step()
        print(time.time_ns())
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads would not survive the fork
    step()
    for _ in sys.stdin:
        print(fork_s(), flush=True)


if __name__ == "__main__":
    main()
