"""One job, and messages about it that are delivered in any order, twice or never: Hypothesis looks for a bad order."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from railbus_shared import lifecycle
from railbus_shared.contracts.jobs import EndCause, JobRecord
from railbus_shared.errors import Conflict, StaleLeaseEpoch
from railbus_shared.happenings import (
    CancelAsked,
    Ended,
    Happening,
    Held,
    Lost,
    Placed,
    PreemptAsked,
    Released,
    Saved,
    Started,
    StartRefused,
    Stopping,
)
from railbus_shared.lifecycle import decide
from records_for_tests import CAUSES, ERROR, T1, record, saved, spec

HOSTS = st.sampled_from("ab")
WAYS = st.sampled_from(["at once", "late", "twice", "never"])


class OneJob(RuleBasedStateMachine):
    """Whoever writes about the job has seen some version of its record, perhaps an old one."""

    def __init__(self) -> None:
        super().__init__()
        self.record = record()
        self.before = self.record
        self.under_way: list[Happening] = []
        self.finals = 0
        self.promised = False

    @initialize(attempts=st.integers(1, 3))
    def submit(self, attempts: int) -> None:
        self.record = self.before = record(of=spec(max_attempts=attempts))

    # --- what is sent: it arrives at once, later, both, or never ----------------------------------------------------

    @rule(host=HOSTS, way=WAYS)
    def place(self, host: str, way: str) -> None:
        self._send(Placed(self.record.lease_epoch + 1, host, (f"{host}-cpu0",)), way)

    @rule(host=HOSTS)
    def run(self, host: str) -> None:
        """The usual way, without trouble."""
        self.place(host, "at once")
        self.start("at once")

    @rule(way=WAYS)
    def start(self, way: str) -> None:
        self._send(Started(self.record.lease_epoch, self._host), way)

    @rule(way=WAYS)
    def refuse(self, way: str) -> None:
        self._send(StartRefused(self.record.lease_epoch, ERROR), way)

    @rule(step=st.integers(1, 9), way=WAYS)
    def save(self, step: int, way: str) -> None:
        epoch = self.record.lease_epoch
        self._send(saved(100 * epoch + step, lease_epoch=epoch, host=self._host), way)

    @rule(way=WAYS)
    def make_room(self, way: str) -> None:
        self._send(PreemptAsked(self.record.lease_epoch, "j-2"), way)
        self._send(Stopping(self.record.lease_epoch, self._host), way)

    @rule(cause=st.sampled_from(CAUSES), way=WAYS)
    def end(self, cause: EndCause, way: str) -> None:
        self._send(Ended(self.record.lease_epoch, self._host, cause, ERROR), way)

    @rule(way=WAYS)
    def lose(self, way: str) -> None:
        self._send(Lost(self.record.lease_epoch, "host_lost", ERROR), way)

    @rule(wish=st.sampled_from([CancelAsked("ada"), Held("ada"), Released()]), way=WAYS)
    def ask(self, wish: Happening, way: str) -> None:
        self._send(wish, way)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def arrive_late(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.under_way) - 1))
        self._deliver(self.under_way.pop(place))

    @property
    def _host(self) -> str:
        return self.record.host or "a"

    def _send(self, happening: Happening, way: str) -> None:
        if way in {"late", "twice"}:
            self.under_way.append(happening)
        if way in {"at once", "twice"}:
            self._deliver(happening)

    def _deliver(self, happening: Happening) -> None:
        self.before = self.record
        with contextlib.suppress(Conflict, StaleLeaseEpoch):
            self._write(happening, decide(self.record, happening, T1).record)

    def _write(self, happening: Happening, after: JobRecord) -> None:
        if isinstance(happening, Saved) and after is not self.record:
            assert happening.lease_epoch == self.record.lease_epoch, "a checkpoint of another attempt counts"
            assert happening.host == self.record.host
        self.finals += after.is_final and not self.record.is_final
        self.promised |= isinstance(happening, CancelAsked) and after.cancel_requested
        self.record = after

    # --- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def keeps_its_promises(self) -> None:
        before, after = self.before, self.record
        assert self.finals <= 1
        assert after.lease_epoch >= before.lease_epoch
        assert not before.is_final or after is before
        assert after.is_active <= bool(after.host and after.devices)
        assert 0 <= after.attempt <= after.spec.max_attempts
        assert not (after.state == "placed" and before.state == "queued") or after.lease_epoch == before.lease_epoch + 1
        assert not (self.promised and after.is_final) or after.state == "cancelled"


SETTINGS = settings(max_examples=100, stateful_step_count=30, deadline=None)

FINDING = settings(SETTINGS, max_examples=1000, database=None, phases=[Phase.generate], report_multiple_bugs=False)
"""Found is enough; shrinking is for people."""

TestOneJob = OneJob.TestCase
TestOneJob.settings = SETTINGS


@pytest.mark.timeout(60)
def test_it_finds_that_epochs_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "check_names", lambda _record, **_names: None)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(OneJob, settings=FINDING)
