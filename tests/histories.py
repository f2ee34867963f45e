"""Whether a recorded history of jobs keeps the promises: a function over their events, in whatever order they lie.

Every event of a change of a record carries the record's revision, which gives all changes of all jobs one order. Events
may be missing, since whoever is killed takes untold ones along, but for the ends of jobs; and they may be doubled, as
those who follow them may hear them. They may not contradict a promise:

- a job has at most one final state, and nothing of it comes after; in the log it stands exactly once (`untold`);
- a lease epoch is placed once and started once, and epochs never fall;
- nothing is saved by an attempt once the job is placed again, and steps do not fall within one;
- a device is in one attempt at a time, as far as the ends of attempts are known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

FINAL = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
ENDS = FINAL | {"job.requeued"}


@dataclass(frozen=True)
class Fact:
    """One event of a change of a record."""

    revision: int
    job: str
    type: str
    lease_epoch: int
    devices: tuple[str, ...] = ()
    step: int | None = None


def violations(events: Iterable[Mapping[str, object]], *, holders: bool = True) -> list[str]:
    """What of a history contradicts a promise, in words; empty if nothing does.

    `holders` is false where messages may arrive after a lease's whole life: a placement that was written so late names
    a device that somebody else has by then, and its attempt ends before it has touched it.
    """
    facts = sorted(set(filter(None, map(_fact, events))), key=lambda fact: fact.revision)
    of_jobs: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        of_jobs[fact.job].append(fact)
    found = [word for own in of_jobs.values() for word in (*_ends(own), *_epochs(own), *_saves(own))]
    return [*found, *_holders(facts)] if holders else found


def untold(log: Iterable[Mapping[str, object]], jobs: Iterable[str]) -> dict[str, int]:
    """Jobs whose end does not stand in a log exactly once, and how often it does."""
    ends = Counter(str(event["job"]) for event in log if event["type"] in FINAL)
    return {job: ends[job] for job in jobs if ends[job] != 1}


def unended(events: Iterable[Mapping[str, object]]) -> set[str]:
    """Jobs that were accepted and of whose end nothing is told."""
    facts = [fact for fact in map(_fact, events) if fact is not None]
    return {fact.job for fact in facts} - {fact.job for fact in facts if fact.type in FINAL}


def _fact(event: Mapping[str, object]) -> Fact | None:
    data = event.get("data")
    if not isinstance(data, Mapping) or "revision" not in data or not str(event["type"]).startswith("job."):
        return None
    devices, step, epoch = data.get("devices"), event.get("step"), event.get("lease_epoch")
    return Fact(
        revision=int(data["revision"]),
        job=str(event["job"]),
        type=str(event["type"]),
        lease_epoch=epoch if isinstance(epoch, int) else 0,
        devices=tuple(devices) if isinstance(devices, list | tuple) else (),
        step=step if isinstance(step, int) else None,
    )


def _ends(own: list[Fact]) -> Iterator[str]:
    first = next((fact for fact in own if fact.type in FINAL), None)
    if first is not None:
        for later in own[own.index(first) + 1 :]:
            yield f"{later.job}: {later.type} at revision {later.revision}, after {first.type} at {first.revision}"


def _epochs(own: list[Fact]) -> Iterator[str]:
    for kinds in ({"job.placed"}, {"job.started"}, ENDS):
        by_epoch: dict[int, list[Fact]] = defaultdict(list)
        for fact in own:
            if fact.type in kinds:
                by_epoch[fact.lease_epoch].append(fact)
        for epoch, facts in by_epoch.items():
            if epoch and len(facts) > 1 and not _is_ended_while_queued(facts):
                yield f"{own[0].job}: {', '.join(f.type for f in facts)} of lease epoch {epoch}"
    for before, after in pairwise(own):
        if after.lease_epoch < before.lease_epoch:
            yield f"{after.job}: {after.type} of lease epoch {after.lease_epoch} after one of {before.lease_epoch}"


def _is_ended_while_queued(facts: list[Fact]) -> bool:
    """A job that was queued again may be cancelled before it is placed; its record still has the epoch then."""
    return [fact.type for fact in facts] == ["job.requeued", "job.cancelled"]


def _saves(own: list[Fact]) -> Iterator[str]:
    over: set[int] = set()
    steps: dict[int, int] = {}
    for fact in own:
        if fact.type in ENDS:
            over.add(fact.lease_epoch)
        elif fact.type == "job.checkpointed":
            if fact.lease_epoch in over:
                yield f"{fact.job}: a checkpoint of lease epoch {fact.lease_epoch} after that attempt's end"
            if fact.step is not None and fact.step < steps.get(fact.lease_epoch, 0):
                yield f"{fact.job}: step {fact.step} after step {steps[fact.lease_epoch]}"
            steps[fact.lease_epoch] = fact.step or 0


def _holders(facts: list[Fact]) -> Iterator[str]:
    """Attempts that were placed on a device between another one's placement and its end."""
    ended = {(fact.job, fact.lease_epoch): fact.revision for fact in reversed(facts) if fact.type in ENDS}
    holding: dict[str, Fact] = {}
    for fact in facts:
        for device in fact.devices if fact.type == "job.placed" else ():
            before = holding.get(device)
            if before is not None and ended.get((before.job, before.lease_epoch), 0) > fact.revision:
                yield f"{device} went to {fact.job} while {before.job} had it"
            holding[device] = fact
