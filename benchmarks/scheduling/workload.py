"""The jobs of a simulation: three sizes from six owners, arriving at times that a seed gives."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, Literal

Size = Literal["small", "medium", "large"]
SIZES: Final[tuple[Size, ...]] = ("small", "medium", "large")
HOSTS: Final = 8
PER_HOST: Final = 8
OWNERS: Final = tuple(f"owner-{number}" for number in range(6))
HEAVY: Final = OWNERS[0]
"""Submits a third of all jobs, in bursts; the five others are alike."""

_DEVICES: Final[dict[Size, int]] = {"small": 1, "medium": 4, "large": 8}
_SHARES: Final[dict[Size, int]] = {"small": 70, "medium": 20, "large": 10}
"""In percent of the jobs, as in Kueue's performance test."""
_SECONDS: Final[dict[Size, tuple[float, float]]] = {"small": (60, 600), "medium": (300, 1800), "large": (600, 3600)}
_BURST: Final = 100
_LOAD: Final = 0.85
"""Of what the devices can do at most, on average."""


@dataclass(frozen=True)
class Job:
    """A job whose run time is known to the simulation, and its time limit to the scheduler."""

    number: int
    owner: str
    size: Size
    arrives_at: float
    run_s: float
    limit_s: float

    @property
    def devices(self) -> int:
        return _DEVICES[self.size]


def workload(num_jobs: int, *, seed: int) -> list[Job]:
    """Jobs by their arrival; time limits are one to three times what a job takes, as users state them."""
    rng = random.Random(seed)
    sizes = rng.choices(SIZES, weights=[_SHARES[size] for size in SIZES], k=num_jobs)
    runs = [rng.uniform(*_SECONDS[size]) for size in sizes]
    work = sum(run * _DEVICES[size] for size, run in zip(sizes, runs, strict=True))
    lasts_s = work / (HOSTS * PER_HOST * _LOAD)
    owners = [HEAVY if rng.random() < 1 / 3 else rng.choice(OWNERS[1:]) for _ in range(num_jobs)]
    arrivals = _arrivals(owners, lasts_s, rng)
    jobs = sorted(zip(arrivals, owners, sizes, runs, strict=True))
    return [
        Job(number, owner, size, at, run, run * rng.uniform(1, 3)) for number, (at, owner, size, run) in enumerate(jobs)
    ]


def _arrivals(owners: list[str], lasts_s: float, rng: random.Random) -> list[float]:
    """The heavy owner's jobs come in bursts, the others' one by one."""
    arrivals, burst_at, left = [], 0.0, 0
    for owner in owners:
        if owner == HEAVY:
            if not left:
                burst_at, left = rng.uniform(0, lasts_s), _BURST
            left -= 1
            arrivals.append(burst_at)
        else:
            arrivals.append(rng.uniform(0, lasts_s))
    return arrivals
