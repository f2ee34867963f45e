"""What `railbus job` and `railbus events` show: a timeline that stays short, and events as they are."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from railbus.cli.event_lines import EventLines, said
from railbus.cli.timeline import Evenly, thinned
from railbus_shared import clock


def event(kind: str, at_s: float, **fields: object) -> dict[str, object]:
    return {"type": kind, "time": clock.rfc3339(int(at_s * 1e9)), "job": "j-1", **fields}


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 1000, 4097])
def test_many_things_are_kept_evenly_and_the_first_and_the_last_always(count: int) -> None:
    evenly = Evenly[int](8)
    for number in range(count):
        evenly.take(number)
    kept = evenly.kept
    assert kept == sorted(set(kept))
    assert evenly.seen == count
    assert len(kept) <= 9
    assert kept[:1] == list(range(count))[:1]
    assert kept[-1:] == list(range(count))[-1:]
    gaps = {after - before for before, after in itertools.pairwise(kept[:-1])}
    assert len(gaps) <= 1


def test_of_a_long_run_the_facts_stay_and_metrics_are_spread_over_all_of_it() -> None:
    metrics = [event("train.metrics", at_s, step=at_s) for at_s in range(2, 20_000)]
    output = [event("job.output", at_s + 0.5, data={"line": str(at_s)}) for at_s in range(2, 10_000)]
    facts = [event("job.succeeded", 30_000), event("job.queued", 1), event("job.checkpointed", 5000.2)]
    timeline = thinned([*metrics, *output, *facts])
    kinds = [str(one["type"]) for one in timeline.events]
    assert [kind for kind in kinds if kind in {"job.queued", "job.checkpointed", "job.succeeded"}] == [
        "job.queued",
        "job.checkpointed",
        "job.succeeded",
    ]
    assert (kinds[0], kinds[1], kinds[-2], kinds[-1]) == (
        "job.queued",
        "train.metrics",
        "train.metrics",
        "job.succeeded",
    )
    assert kinds.count("job.output") == 20
    assert timeline.left_out + len(timeline.events) == len(metrics) + len(output) + len(facts)
    assert len(timeline.events) < 600


def test_an_event_is_one_line_that_fits_and_harms_no_terminal() -> None:
    out = io.StringIO()
    told = event("job.output", 1.5, severity="info", step=3, data={"line": "red\x1b[31m\nnext", "loss": 0.123456789})
    EventLines(Console(file=out, width=80, force_terminal=False)).write(told)
    EventLines(Console(file=out, width=40, force_terminal=False)).write(told)
    wide, narrow = (line for line in out.getvalue().splitlines() if not line.startswith("—"))
    hidden = "\N{REPLACEMENT CHARACTER}"
    assert wide == f"00:00:01.500 job.output           j-1  step=3  line=red{hidden}next  loss=0.12346"
    assert (len(narrow), narrow[-1]) == (40, "…")


def test_an_event_that_is_none_is_a_harmless_line_as_well() -> None:
    out = io.StringIO()
    EventLines(Console(file=out, width=80, force_terminal=False)).write(
        {"type": ["a\x1b"], "job": "\x1b]0;t\x07", "time": "\x1b" * 30}
    )
    assert out.getvalue().split() == ["�" * 12, "['a\\x1b']"]


def test_data_of_every_kind_is_said_in_one_line() -> None:
    told = {"data": {"devices": ["h-cpu0"], "error": {"code": "X", "share": 0.5}, "by": None}}
    assert said(told) == "devices=[h-cpu0]  error={code: X, share: 0.5}  by=None"
    assert said({"data": "no map"}) == said({}) == ""
