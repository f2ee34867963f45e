"""How a dataset is cut in two: what is trained on, and what is held out."""

from __future__ import annotations

from railbus_shared.contracts.artifacts import Split


def splits(samples: int, *, held_out_frac: float, held_out: str) -> dict[str, Split]:
    """`train`, and the last samples as the split `held_out`; at least one of each where a share is wanted and fits."""
    count = round(samples * held_out_frac)
    if held_out_frac > 0:
        count = min(max(count, 1), samples - 1)
    found = {"train": Split(first=0, samples=samples - count)}
    if count:
        found[held_out] = Split(first=samples - count, samples=count)
    return found
