"""Events in human words: which of a job's events are worth a line, and what the line says.

Metrics come many a second; a line of them is told at most every `metrics_s` seconds, but evaluations (metrics without
a loss) always are. An event of a type that is not known here is told by its type and data, never hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from railbus.cli.render import duration, size
from railbus.cli.texts import quoted, set_apart
from railbus_shared import clock

Tone = Literal["plain", "good", "bad", "note"]
Data = Mapping[str, object]

STYLES: Final[Mapping[Tone, str]] = {"plain": "", "good": "green", "bad": "red", "note": "dim"}
_SYMBOLS: Final[Mapping[Tone, str]] = {"plain": "•", "good": "✓", "bad": "✗", "note": "·"}
_RATIOS: Final = ("accuracy", "_frac")
_HIDDEN: Final = frozenset({"checkpoint.written", "checkpoint.completed", "checkpoint.removed", "checkpoint.swept"})
"""Said better by `job.checkpointed`, or of no news to a person."""
_HASH_SHOWN: Final = 12


@dataclass(frozen=True)
class Line:
    """One line of the story."""

    text: str
    tone: Tone = "plain"

    @property
    def symbol(self) -> str:
        return _SYMBOLS[self.tone]


@dataclass
class Story:
    """Tells the events of one job, or of many if `names_job`."""

    metrics_s: float = 2.0
    """Least time between two lines of metrics."""
    names_job: bool = False
    _running_ns: dict[str, int] = field(default_factory=dict)
    _metrics_ns: dict[str, int] = field(default_factory=dict)

    def tell(self, event: Mapping[str, object]) -> Line | None:
        """The line for an event; None if it is not worth one now."""
        kind, job = str(event.get("type", "")), str(event.get("job") or "")
        data = event.get("data")
        facts: Data = data if isinstance(data, dict) else {}
        time_ns = _time_ns(event)
        if kind in {"job.running", "job.started"}:
            self._running_ns[job] = time_ns
        if kind in _HIDDEN or (kind == "train.metrics" and self._is_too_soon(job, facts, time_ns)):
            return None
        if kind == "job.first_step":
            facts = {"after_s": self._since_running(job, time_ns), **facts}
        teller = _TELLERS.get(kind)
        line = teller(event, facts) if teller else _unknown(event, facts)
        about = f"{job}  " if self.names_job and job else ""
        traceback = [] if self.names_job else quoted(_traceback(facts), newest=True)
        return Line("\n".join([set_apart(about + line.text), *traceback]), line.tone)

    def _since_running(self, job: str, time_ns: int) -> float | None:
        began_ns = self._running_ns.get(job)
        return None if began_ns is None else (time_ns - began_ns) / clock.NS_PER_S

    def _is_too_soon(self, job: str, facts: Data, time_ns: int) -> bool:
        if "loss" not in _metrics(facts):
            return False
        last_ns = self._metrics_ns.get(job)
        if last_ns is not None and time_ns - last_ns < self.metrics_s * clock.NS_PER_S:
            return True
        self._metrics_ns[job] = time_ns
        return False


def _time_ns(event: Mapping[str, object]) -> int:
    try:
        return clock.parse_rfc3339(str(event.get("time", "")))
    except ValueError:
        return 0  # an event of a stranger; it is told without times


# --- one function for each type ---------------------------------------------------------------------------------------


def _queued(_: Mapping[str, object], data: Data) -> Line:
    what = f": {data['entrypoint']} of {data['model']} on {data['dataset']}" if "model" in data else ""
    return Line(f"queued{what}")


def _placed(event: Mapping[str, object], data: Data) -> Line:
    devices = data.get("devices")
    named = ", ".join(str(one) for one in devices) if isinstance(devices, list) else str(data.get("device", ""))
    host = data.get("placed_on") or event.get("host")
    return Line(f"placed on {named or 'a device'}" + (f" of {host}" if host else ""))


def _running(event: Mapping[str, object], data: Data) -> Line:
    attempt = event.get("attempt")
    again = f", attempt {attempt}" if isinstance(attempt, int) and attempt > 1 else ""
    start = data.get("start_s")
    return Line(f"running{again}" + (f" after {duration(start)}" if isinstance(start, int | float) else ""))


def _first_step(_: Mapping[str, object], data: Data) -> Line:
    after = data.get("seconds", data.get("after_s"))
    return Line("first step" + (f" after {after * 1000:.0f} ms" if isinstance(after, int | float) else ""))


def _told_metrics(event: Mapping[str, object], data: Data) -> Line:
    numbers = _metrics(data)
    step = event.get("step")
    where = "" if step is None else f"step {step:>6}  "
    told = "  ".join(f"{name} {_number(name, value)}" for name, value in numbers.items())
    return Line(f"{where}{told}", "plain" if "loss" not in numbers else "note")


def _metrics(data: Data) -> Data:
    inner = data.get("metrics")
    return inner if isinstance(inner, dict) else data


def _number(name: str, value: object) -> str:
    if isinstance(value, float) and name.endswith(_RATIOS) and 0 <= value <= 1:
        return f"{value:.2%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _checkpointed(event: Mapping[str, object], data: Data) -> Line:
    name = str(data.get("checkpoint") or data.get("number") or "")
    digest = str(data.get("sha256", ""))[:_HASH_SHOWN]
    num_bytes = data.get("bytes")
    weight = f"  {size(num_bytes)}" if isinstance(num_bytes, int) else ""
    return Line(f"{name}  step {event.get('step', '?')}{weight}  sha256 {digest}…", "good")


def _resumed(event: Mapping[str, object], data: Data) -> Line:
    return Line(f"resumed from {data.get('checkpoint', 'a checkpoint')} at step {event.get('step', '?')}")


def _not_valid(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"{data.get('checkpoint', 'a checkpoint')} is not used{_error(data)}", "bad")


def _not_written(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"a checkpoint could not be written{_error(data)}", "bad")


def _not_begun(event: Mapping[str, object], data: Data) -> Line:
    """Before a stop that comes too soon, or because the one before is still being written."""
    if data.get("why") != "too_late":
        return Line(f"no checkpoint at step {event.get('step', '?')}: {data.get('why', '?')}", "note")
    left = data.get("relies_on") or "what was saved before this attempt"
    if data.get("is_writing"):
        left = f"the one that is being written, or from {left}"
    return Line(f"no time for a last checkpoint; the job goes on from {left}", "bad")


def _cancel_requested(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"asked to end{_by(data)}")


def _by(data: Data) -> str:
    return f" by {data['by']}" if data.get("by") else ""


def _held(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"held{_by(data)}: it does not start before it is released")


def _released(_event: Mapping[str, object], _: Data) -> Line:
    return Line("released")


def _priority_set(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"priority {data.get('priority')}, before {data.get('before')}")


def _preempting(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"asked to make room for {data.get('by', 'another job')}")


def _described(_: Mapping[str, object], data: Data) -> Line:
    num_bytes = data.get("bytes")
    weight = f", {size(num_bytes)}" if isinstance(num_bytes, int) else ""
    samples, shards = _count(data.get("samples"), "sample"), _count(data.get("shards"), "shard")
    return Line(f"dataset {data.get('dataset')}: {samples} in {shards}{weight}")


def _shards_opened(_: Mapping[str, object], data: Data) -> Line:
    shards, verified = data.get("shards"), data.get("verified")
    state = " and verified" if verified == shards else f", {verified} verified so far" if verified else ""
    return Line(f"dataset {data.get('dataset')}: {_count(shards, 'shard')} opened{state}")


def _shards_verified(_: Mapping[str, object], data: Data) -> Line:
    num_bytes = data.get("bytes")
    weight = f", {size(num_bytes)}" if isinstance(num_bytes, int) else ""
    return Line(f"dataset {data.get('dataset')}: {_count(data.get('shards'), 'shard')} verified{weight}", "good")


def _count(value: object, noun: str, many: str = "") -> str:
    number = len(value) if isinstance(value, list) else value
    return f"{number} {noun}" if number == 1 else f"{number} {many or f'{noun}s'}"


def _output(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"| {data.get('line', data.get('text', ''))}", "note")


def _log_line(event: Mapping[str, object], data: Data) -> Line:
    is_bad = event.get("severity") in {"warning", "error"}
    fields, traceback = data.get("fields"), quoted(str(data.get("traceback") or ""), newest=True)
    told = "".join(f"  {name}={_brief(value)}" for name, value in (fields.items() if isinstance(fields, dict) else ()))
    text = f"{event.get('source')}: {data.get('message')}{told}"
    return Line("\n".join([text, *traceback]), "bad" if is_bad else "note")


def _stalled(_: Mapping[str, object], data: Data) -> Line:
    seconds = data.get("stall_s")
    for_long = f" for {duration(seconds)}" if isinstance(seconds, int | float) else ""
    ends = "; it is ended" if data.get("on_stall") == "end" else ""
    head = f"no step{for_long}{ends}; the stacks of its threads:"
    return Line("\n".join([head, *quoted(str(data.get("stacks", "")))]), "bad")


def _leaked(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"{_count(data.get('count'), 'process', 'processes')} left behind, and ended", "bad")


def _workdir_removed(_: Mapping[str, object], data: Data) -> Line:
    names = data.get("names")
    shown = ", ".join(map(repr, names)) if isinstance(names, list) else "?"
    return Line(f"{_count(data.get('files'), 'file', 'files')} removed with the working directory: {shown}", "bad")


def _told_by(words: str, tone: Tone = "plain") -> Callable[[Mapping[str, object], Data], Line]:
    """A teller that says these words, with the event's facts in their places."""

    def tell(_: Mapping[str, object], data: Data) -> Line:
        return Line(words.format_map(_Facts(data)), tone)

    return tell


class _Facts(dict[str, object]):
    """What is not there is a question mark."""

    def __missing__(self, name: str) -> str:
        return "?"


def _text(_: Mapping[str, object], data: Data) -> Line:
    return Line("\n".join([f"{data.get('name', 'text')}:", *quoted(str(data.get("text", "")))]))


def _requeued(_: Mapping[str, object], data: Data) -> Line:
    wait = data.get("backoff_s")
    again = f"; tried again after {duration(wait)}" if isinstance(wait, int | float) and wait else ""
    error = _error(data)
    return Line(f"back in the queue ({data.get('cause') if error else _why(data)}){error}{again}", "bad")


def _why(data: Data) -> object:
    return data.get("why") or data.get("cause") or "lost"


def _rejected(_: Mapping[str, object], data: Data) -> Line:
    return Line(f"rejected{_error(data)}", "bad")


def _succeeded(_: Mapping[str, object], data: Data) -> Line:
    numbers = _metrics({"metrics": data.get("metrics", {})})
    told = ", ".join(f"{name} {_number(name, value)}" for name, value in numbers.items())
    return Line("succeeded" + (f"  ({told})" if told else ""), "good")


def _failed(_: Mapping[str, object], data: Data) -> Line:
    why = data.get("cause") or data.get("reason") or "no reason given"
    return Line(f"failed{_error(data) or f': {why}'}", "bad")


def _cancelled(_: Mapping[str, object], data: Data) -> Line:
    kept = data.get("checkpoint")
    return Line(f"cancelled{_by(data)}" + (f"; its last checkpoint is {kept}" if kept else ""), "bad")


def _error(data: Data) -> str:
    error = data.get("error")
    if not isinstance(error, dict):
        return ""
    hint = f" ({error['hint']})" if error.get("hint") else ""
    return f": {error.get('code')}: {error.get('message')}{hint}"


def _traceback(data: Data) -> str:
    """Of what raised; the line above has no more than its last."""
    error = data.get("error")
    details = error.get("details") if isinstance(error, dict) else None
    return str(details.get("traceback") or "") if isinstance(details, dict) else ""


def _service(event: Mapping[str, object], data: Data) -> Line:
    what = str(event.get("type")).partition(".")[2]
    return Line(f"{data.get('service', event.get('source'))} {what} {data.get('url', '')}".rstrip(), "note")


def _unknown(event: Mapping[str, object], data: Data) -> Line:
    told = "  ".join(f"{name}={_brief(value)}" for name, value in data.items())
    tone: Tone = "bad" if event.get("severity") in {"warning", "error"} else "note"
    return Line(f"{event.get('type', 'event')}  {told}".rstrip(), tone)


def _brief(value: object) -> str:
    text = str(value).replace("\n", "⏎")
    return text if len(text) <= 60 else f"{text[:59]}…"


_TELLERS: Final[Mapping[str, Callable[[Mapping[str, object], Data], Line]]] = {
    "job.queued": _queued,
    "job.rejected": _rejected,
    "job.placed": _placed,
    "job.running": _running,
    "job.started": _running,
    "job.first_step": _first_step,
    "job.checkpointed": _checkpointed,
    "job.requeued": _requeued,
    "job.output": _output,
    "job.succeeded": _succeeded,
    "job.failed": _failed,
    "job.cancelled": _cancelled,
    "train.metrics": _told_metrics,
    "train.text": _text,
    "job.cancel_requested": _cancel_requested,
    "job.held": _held,
    "job.released": _released,
    "job.priority_set": _priority_set,
    "job.preempting": _preempting,
    "job.stalled": _stalled,
    "job.output_dropped": _told_by(
        "| … {lines} lines of {stream}, {bytes} bytes, are left out: too many at once", "bad"
    ),
    "job.lease_awaited": _told_by("stood still for {seconds} s, until its lease was renewed", "bad"),
    "attempt.leaked": _leaked,
    "attempt.stuck": _told_by("processes that cannot be ended: {pids}", "bad"),
    "attempt.workdir_removed": _workdir_removed,
    "attempt.fenced": _told_by("the attempt is no longer the job's; nothing of it counts", "bad"),
    "device.leased": _told_by("{device} leased to {holder}"),
    "device.released": _told_by("{device} given back by {holder}"),
    "device.reclaimed": _told_by("{device} is clear again"),
    "device.cordoned": _told_by("{device} takes no new jobs: {reason} ({by})", "bad"),
    "device.uncordoned": _told_by("{device} takes jobs again ({by})", "good"),
    "device.xid": _told_by("{device}: XID {xid}, {words}", "bad"),
    "device.leaked": _told_by("{device} is used by processes {pids} though nobody has leased it", "bad"),
    "logs.moved": _told_by("the log goes on in {path}; before it was written in {before} of {host_before}", "bad"),
    "host.drained": _told_by("{host_id} takes no new jobs"),
    "host.undrained": _told_by("{host_id} takes jobs again", "good"),
    "checkpoint.resumed": _resumed,
    "checkpoint.rejected": _not_valid,
    "checkpoint.failed": _not_written,
    "checkpoint.paused": _told_by("takes no step until there is room for a checkpoint", "bad"),
    "checkpoint.skipped": _not_begun,
    "checkpoint.loaded": _told_by("{loaded} weights loaded from {path}"),
    "dataset.described": _described,
    "dataset.withdrawn": _told_by("dataset {dataset} is here no longer"),
    "dataset.opened": _shards_opened,
    "dataset.verified": _shards_verified,
    "log.line": _log_line,
    "service.started": _service,
    "service.stopped": _service,
}
