"""The states of a job as a picture and tables for `docs/jobs.md`, drawn from the tables that the services obey."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, get_args

from railbus_shared import retrying
from railbus_shared.contracts.jobs import FINAL_STATES, EndCause, JobState
from railbus_shared.happenings import Happening
from railbus_shared.lifecycle import TRANSITIONS

BEGIN: Final = "<!-- From here on made by `make docs` from the code; do not edit. -->"
END: Final = "<!-- Until here made by `make docs` from the code. -->"


def with_states(page: str) -> str:
    """The page with what stands between the two marks made anew; raises ValueError if it lacks a mark."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{states_part()}\n{END}{after}"


def states_part() -> str:
    """Picture of the states, what may happen in each, and what an end means."""
    picture = "\n".join(["```mermaid", "stateDiagram-v2", *_edges(), "```"])
    return "\n".join([picture, "", *_happenings_table(), "", *_causes_table(), ""])


def _edges() -> Iterator[str]:
    yield "    [*] --> queued: submitted"
    for state, row in TRANSITIONS.items():
        labels: dict[JobState, list[str]] = {}
        for happening, followers in row.items():
            for follower in sorted(followers - {state}):
                labels.setdefault(follower, []).append(_words(happening))
        for follower, words in labels.items():
            yield f"    {state} --> {follower}: {', '.join(words)}"
    for final in sorted(FINAL_STATES):
        yield f"    {final} --> [*]"


def _happenings_table() -> Iterator[str]:
    yield "| in state | may happen | then it is |"
    yield "| --- | --- | --- |"
    for state, row in TRANSITIONS.items():
        for happening, followers in row.items():
            yield f"| `{state}` | {_words(happening)} | {', '.join(f'`{one}`' for one in sorted(followers))} |"


def _causes_table() -> Iterator[str]:
    yield "| an attempt ended by | tried again | counts as an attempt |"
    yield "| --- | --- | --- |"
    for cause in get_args(EndCause):
        if cause not in retrying.ALWAYS_FINAL:
            again = "yes" if cause in retrying.RETRIED else "no"
            yield f"| `{cause}` | {again} | {'no' if cause in retrying.NOT_COUNTED else 'yes'} |"


def _words(happening: type[Happening]) -> str:
    """`StartRefused` as `start refused`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", happening.__name__).lower()
