"""Events become words: what is said of each type, and how metrics are thinned."""

from __future__ import annotations

import pytest

from railbus.cli.story import Story
from railbus_shared import clock


def event(kind: str, *, at_s: float = 0.0, job: str = "j-1", **fields: object) -> dict[str, object]:
    data = fields.pop("data", {})
    return {"type": kind, "time": clock.rfc3339(int(at_s * 1e9)), "job": job, "host": "h", "data": data, **fields}


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (
            event("job.queued", data={"entrypoint": "classifier", "model": "m", "dataset": "d"}),
            "queued: classifier of m on d",
        ),
        (event("job.placed", data={"placed_on": "h", "devices": ["h-cpu0"]}), "placed on h-cpu0 of h"),
        (event("job.started", attempt=1), "running"),
        (event("job.started", attempt=2), "running, attempt 2"),
        (event("job.first_step", data={"seconds": 0.203}), "first step after 203 ms"),
        (
            event("train.metrics", step=120, data={"loss": 0.123456, "lr": 0.001}),
            "step    120  loss 0.1235  lr 0.001",
        ),
        (event("train.metrics", step=23, data={"accuracy": 0.97222}), "step     23  accuracy 97.22%"),
        (
            event(
                "job.checkpointed",
                step=460,
                data={"checkpoint": "checkpoint-000003", "sha256": "ab12" * 16, "bytes": 123_456},
            ),
            "checkpoint-000003  step 460  123 kB  sha256 ab12ab12ab12…",
        ),
        (
            event("checkpoint.resumed", step=460, data={"checkpoint": "checkpoint-000003"}),
            "resumed from checkpoint-000003 at step 460",
        ),
        (
            event("train.text", data={"name": "sample", "text": "\nThe first line  \n\n  the third\x1b[2J"}),
            "sample:\n    | The first line\n    |\n    |   the third\N{REPLACEMENT CHARACTER}[2J",
        ),
        (event("train.text", data={}), "text:\n    |"),
        (
            event("checkpoint.failed", data={"error": {"code": "STORAGE_FULL", "message": "no space left"}}),
            "a checkpoint could not be written: STORAGE_FULL: no space left",
        ),
        (
            event("checkpoint.skipped", data={"why": "too_late", "relies_on": "checkpoint-000002"}),
            "no time for a last checkpoint; the job goes on from checkpoint-000002",
        ),
        (event("job.held", data={"by": "ana"}), "held by ana: it does not start before it is released"),
        (event("job.released"), "released"),
        (event("job.priority_set", data={"priority": 5, "before": 0}), "priority 5, before 0"),
        (
            event("job.stalled", data={"stall_s": 90.0, "on_stall": "end", "stacks": "File a\n  line 3"}),
            "no step for 1m 30s; it is ended; the stacks of its threads:\n    | File a\n    |   line 3",
        ),
        (event("attempt.leaked", data={"count": 2, "processes": []}), "2 processes left behind, and ended"),
        (
            event("attempt.workdir_removed", data={"files": 1, "names": ["a\nb"]}),
            "1 file removed with the working directory: 'a\\nb'",
        ),
        (
            event("device.cordoned", data={"device": "h-gpu0", "reason": "XID 79", "by": "h"}),
            "h-gpu0 takes no new jobs: XID 79 (h)",
        ),
        (event("device.released", data={"device": "h-gpu0"}), "h-gpu0 given back by ?"),
        (event("job.preempting", data={"by": "j-2"}), "asked to make room for j-2"),
        (event("job.cancel_requested", data={"by": "ana"}), "asked to end by ana"),
        (event("job.cancelled", data={"by": "ana", "cause": "cancelled"}), "cancelled by ana"),
        (
            event("job.requeued", data={"cause": "signal", "why": "killed by SIGKILL", "backoff_s": 2.0}),
            "back in the queue (killed by SIGKILL); tried again after 2.0s",
        ),
        (event("job.output", data={"stream": "stdout", "line": "hello"}), "| hello"),
        (
            event("job.output", data={"line": "\x1b[31mred\x1b[0m\x1b]0;title\x07 \x1b[5A\tup\x07"}),
            "| red   up\N{REPLACEMENT CHARACTER}",
        ),
        (
            event("log.line", source="trainer", data={"message": "one\n12:00 two\x1b[2J"}),
            "trainer: one\n    | 12:00 two",
        ),
        (
            event("log.line", source="runner", data={"message": "no", "traceback": "Traceback:\nValueError"}),
            "runner: no\n    | Traceback:\n    | ValueError",
        ),
        (event("log.line", source="pre", data={"message": "short", "fields": {"rows": 3}}), "pre: short  rows=3"),
        (event("app.mine", data={"note": "one\ntwo\x1b"}), "app.mine  note=one⏎two\N{REPLACEMENT CHARACTER}"),
        (
            event("dataset.described", data={"dataset": "d", "samples": 1797, "shards": 1, "bytes": 474_688}),
            "dataset d: 1797 samples in 1 shard, 475 kB",
        ),
        (event("job.succeeded", data={"metrics": {"accuracy": 0.981}}), "succeeded  (accuracy 98.10%)"),
        (
            event("job.failed", data={"error": {"code": "BAD_PARAMS", "message": "lr is no number", "hint": "fix it"}}),
            "failed: BAD_PARAMS: lr is no number (fix it)",
        ),
        (event("job.failed", data={"cause": "host_oom"}), "failed: host_oom"),
        (event("job.cancelled", data={}), "cancelled"),
        (event("job.requeued", data={"cause": "runner_lost"}), "back in the queue (runner_lost)"),
        (event("app.rows_written", data={"rows": 1000}), "app.rows_written  rows=1000"),
        (event("job.failed", data={"error": "no map"}), "failed: no reason given"),
        ({}, "event"),
        ({"type": 3, "data": [1]}, "3"),
    ],
)
def test_an_event_is_told_in_words(told: dict[str, object], text: str) -> None:
    line = Story().tell(told)
    assert line is not None
    assert line.text == text


@pytest.mark.parametrize("kind", ["checkpoint.written", "checkpoint.removed"])
def test_what_is_said_better_by_another_event_is_left_out(kind: str) -> None:
    assert Story().tell(event(kind)) is None


def test_a_long_text_is_cut_and_says_so() -> None:
    line = Story().tell(event("train.text", data={"name": "sample", "text": "x" * 3234}))
    assert line is not None
    assert line.text == f"sample:\n    | {'x' * 2000}\n    | … and 1,234 characters more"


def failed(traceback: str) -> dict[str, object]:
    error = {"code": "ENTRYPOINT_FAILED", "message": "ValueError: deep", "details": {"traceback": traceback}}
    return event("job.failed", data={"error": error})


def test_what_raised_is_shown_below_the_failure_of_a_job_that_is_looked_at() -> None:
    line = Story().tell(failed("Traceback\n  File a, line 3\nValueError: deep\n"))
    logged = Story(names_job=True).tell(event("log.line", source="s", data={"message": "m", "traceback": "Trace"}))
    among_others = Story(names_job=True).tell(failed("Traceback\n  File a, line 3\nValueError: deep\n"))
    assert line is not None
    assert among_others is not None
    said = "failed: ENTRYPOINT_FAILED: ValueError: deep"
    assert line.text == f"{said}\n    | Traceback\n    |   File a, line 3\n    | ValueError: deep"
    assert among_others.text == f"j-1  {said}"
    assert logged is not None
    assert logged.text == "j-1  s: m\n    | Trace"


def test_of_a_long_traceback_the_end_is_shown() -> None:
    line = Story().tell(failed("x" * 3000 + "\nValueError: deep"))
    assert line is not None
    assert line.text.splitlines()[1:] == [
        "    | … 1,017 characters more",
        f"    | {'x' * 1983}",
        "    | ValueError: deep",
    ]


def test_losses_are_thinned_and_evaluations_never_are() -> None:
    story = Story(metrics_s=2.0)
    losses = [story.tell(event("train.metrics", at_s=step * 0.1, data={"loss": 1.0})) for step in range(50)]
    scores = [story.tell(event("train.metrics", at_s=step * 0.1, data={"accuracy": 0.5})) for step in range(50)]
    assert [at for at, line in enumerate(losses) if line] == [0, 20, 40]
    assert all(scores)


def test_each_job_has_its_own_pace() -> None:
    story = Story(metrics_s=2.0, names_job=True)
    lines = [story.tell(event("train.metrics", job=job, data={"loss": 1.0})) for job in ("j-1", "j-2", "j-1")]
    assert [line and line.text.split()[0] for line in lines] == ["j-1", "j-2", None]


def test_without_the_trainers_own_figure_the_first_step_counts_from_the_start() -> None:
    story = Story()
    story.tell(event("job.started", at_s=10.0))
    line = story.tell(event("job.first_step", at_s=10.25))
    assert line is not None
    assert line.text == "first step after 250 ms"
