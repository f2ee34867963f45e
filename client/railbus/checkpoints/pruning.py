"""Which checkpoints are not needed any more, and their removal.

Of each job what its policy keeps stays, what a job that has not ended names stays, and so does the newest that is
whole: those that are kept as the newest or the best are hashed first, and a damaged one counts for nothing. One whose
meta cannot be read belongs to nobody, and is not touched.

Of what lies beside checkpoints only that goes which is surely of no use: of an attempt that is over, not named by the
job's record, and untouched for a while.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from railbus.checkpoints.catalogue import Checkpoint
from railbus.checkpoints.leftovers import Leftover
from railbus.checkpoints.proof import Report, fault, silent
from railbus_shared import files
from railbus_shared.contracts.jobs import CheckpointPolicy, JobRecord
from railbus_shared.errors import InvalidField
from railbus_shared.layout import Layout
from railbus_shared.retention import Pins, Retention, Why, retention

_HASHED: Final = frozenset({"newest", "best"})
_QUIET_S: Final = 60.0
"""How long litter must have been left alone; the writer of a dead attempt ends within ten seconds."""
_OLD_S: Final = 86_400.0
"""The same for litter of which nobody knows whose it is."""


@dataclass(frozen=True)
class Rules:
    """What a person wants to be kept; where it is None, what the job itself asked for."""

    keep_last: int | None = None
    keep_best: int | None = None
    metric: str | None = None
    best: str | None = None
    keep_every_steps: int | None = None

    def of(self, own: CheckpointPolicy | None, *, job: str) -> CheckpointPolicy:
        """These rules for a job; raises InvalidField if nothing says how many are to be kept."""
        if own is None and self.keep_last is None:
            raise InvalidField(
                field="keep_last", value=None, problem=f"the checkpoints of job {job} do not say what it asked for",
                hint="say how many are to be kept: --keep-last 3",
            )  # fmt: skip
        asked = {name: value for name, value in asdict(self).items() if value is not None}
        policy = (own or CheckpointPolicy()).to_map() | asked
        if policy["keep_best"] == 0:
            policy.pop("metric", None)
        return CheckpointPolicy.parse(policy)


@dataclass(frozen=True)
class Fate:
    """What becomes of a checkpoint."""

    one: Checkpoint
    whys: tuple[Why, ...]
    """For which reasons it stays; it goes if there is none."""
    is_damaged: bool = False

    @property
    def stays(self) -> bool:
        return bool(self.whys)

    def to_map(self) -> dict[str, object]:
        return {
            "model": self.one.meta.model,
            "number": self.one.meta.number,
            "job": self.one.meta.job,
            "step": self.one.meta.step,
            "bytes": self.one.num_bytes,
            "path": str(self.one.path),
            "kept": list(self.whys),
            "damaged": self.is_damaged,
        }


def own_policy(found: Iterable[Checkpoint]) -> CheckpointPolicy | None:
    """What the newest of a job's checkpoints says that the job asked for."""
    newest = max(found, key=lambda one: one.meta.number)
    return newest.meta.policy


def by_job(found: Iterable[Checkpoint]) -> dict[str, list[Checkpoint]]:
    """Checkpoints of one model by their jobs, each in the order given."""
    jobs: dict[str, list[Checkpoint]] = {}
    for one in found:
        jobs.setdefault(one.meta.job, []).append(one)
    return jobs


def fates(
    found: Sequence[Checkpoint], rules: Rules, *, pinned: Pins | None = None, report: Report = silent
) -> list[Fate]:
    """Decide on checkpoints of one model, in the order given; reads those that are kept as the newest or best.

    Args:
        found: all of the jobs in question.
        rules: what is to be kept of each job.
        pinned: numbers that stay whatever the rules say.
        report: is told how much is hashed.

    Raises InvalidField.
    """
    decided: dict[int, Fate] = {}
    for job, own in by_job(found).items():
        policy = rules.of(own_policy(own), job=job)
        kept, damaged = _kept(own, policy, pinned or {}, report)
        for one in own:
            number = one.meta.number
            decided[number] = Fate(one, kept.kept.get(number, ()), is_damaged=number in damaged)
    return [decided[one.meta.number] for one in found]


def _kept(
    own: Sequence[Checkpoint], policy: CheckpointPolicy, pinned: Pins, report: Report
) -> tuple[Retention, set[int]]:
    """What is kept of a job once all that is kept as the newest or best has been shown to be whole."""
    by_number = {one.meta.number: one for one in own}
    metas = [one.meta for one in own]
    whole, damaged = set[int](), set[int]()
    while True:
        plan = retention(metas, policy, pinned=pinned, damaged=damaged)
        open_ones = [number for number, whys in plan.kept.items() if _HASHED & set(whys) and number not in whole]
        if not open_ones:
            return plan, damaged
        for number in open_ones:
            is_damaged = fault(by_number[number], report=report) is not None
            (damaged if is_damaged else whole).add(number)


def remove(layout: Layout, going: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Remove checkpoints as their jobs' own attempts do, of each job the oldest first, and give those that are gone.

    The number is claimed again, the meta goes, then the data: what a kill leaves is swept by the job's next attempt, or
    is litter. The newest of a job stays whatever is asked for.
    """
    groups: dict[tuple[str, str], list[Checkpoint]] = {}
    for one in going:
        groups.setdefault((one.meta.model, one.meta.job), []).append(one)
    return [one for own in groups.values() for one in _remove_of_job(layout, own)]


def _remove_of_job(layout: Layout, own: Sequence[Checkpoint]) -> list[Checkpoint]:
    from railbus_runner.checkpointing.store import CheckpointStore  # noqa: PLC0415 - of a service; it needs no torch

    newest = max((one.meta for one in own), key=lambda meta: meta.lease_epoch)
    numbers = [one.meta.number for one in own]
    store = CheckpointStore(layout, newest.model, job=newest.job, lease_epoch=newest.lease_epoch)
    gone = store.retain(lambda _metas: numbers)
    return [one for one in own if one.meta.number in gone]


def dead(one: Leftover, records: Mapping[str, JobRecord] | None, *, now_s: float) -> bool:
    """Whether a leftover is surely of no use to anybody.

    Args:
        one: what lies there.
        records: of the jobs that NATS knows; None if it was not asked, and somebody else vouches that nothing runs.
        now_s: seconds since 1970.
    """
    left_alone_s = now_s - one.changed_s
    if records is None or one.job is None or one.lease_epoch is None:
        return left_alone_s > (_QUIET_S if records is None else _OLD_S)
    record = records.get(one.job)
    if record is None:
        return left_alone_s > _OLD_S
    if record.checkpoint is not None and record.checkpoint.number == one.number:
        return False  # recorded, but its meta has not got its name: the next attempt completes it
    is_over = not record.is_active or record.lease_epoch > one.lease_epoch
    return is_over and left_alone_s > _QUIET_S


def litter(
    layout: Layout, model: str, found: Sequence[Leftover], records: Mapping[str, JobRecord] | None, *, now_s: float
) -> list[Leftover]:
    """Of a model's leftovers those that may go, see `dead`: of a number all, or nothing.

    Where NATS was not asked, a number that has a draft of its meta stays, for a record may name it.
    """
    by_number: dict[int, list[Leftover]] = {}
    for one in found:
        by_number.setdefault(one.number, []).append(one)
    return [
        one
        for number, together in by_number.items()
        if all(dead(one, records, now_s=now_s) for one in together)
        and (records is not None or not files.temporary_path(layout.checkpoint_meta(model, number)).exists())
        for one in together
    ]


def remove_leftovers(found: Iterable[Leftover]) -> None:
    """Remove what `litter` gave: the claims last, the highest of which stays, empty, so that no number comes again."""
    from railbus_runner.checkpointing import serials  # noqa: PLC0415 - of a service, which the client loads late

    for one in sorted(found, key=lambda one: one.kind == "claim"):
        if one.kind == "claim":
            serials.release(one.path.parent, one.number)
        elif one.path.is_dir() and not one.path.is_symlink():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)
