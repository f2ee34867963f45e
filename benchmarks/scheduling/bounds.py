"""The range file: what figures must not leave, and why. A bound is a number, or a multiple of a reference's figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

RANGES: Final = Path(__file__).with_name("ranges.json")


@dataclass(frozen=True)
class Bound:
    """One figure that must not be greater, or not be less, than a limit."""

    figure: str
    limit: float
    is_upper: bool
    why: str

    def problem(self, value: float) -> str:
        """What is wrong with the value; empty if nothing is."""
        if value <= self.limit if self.is_upper else value >= self.limit:
            return ""
        word = "at most" if self.is_upper else "at least"
        return f"{self.figure} is {value:.4g}, must be {word} {self.limit:.4g}: {self.why}"


def bounds(scenario: str, references: Mapping[str, Mapping[str, float]]) -> list[Bound]:
    """The bounds of a scenario; `references` are figures by the name of what they were measured with."""
    found = []
    for entry in json.loads(RANGES.read_text())[scenario]["bounds"]:
        limit = float(entry["limit"])
        if "times" in entry:
            limit *= references[entry["times"]][entry["figure"]]
        found.append(Bound(entry["figure"], limit, entry["bound"] == "at most", entry["why"]))
    return found


def settings_of(scenario: str) -> dict[str, Any]:
    """How a scenario is run: number of jobs and seed."""
    found: dict[str, Any] = json.loads(RANGES.read_text())[scenario]["run"]
    return found


def problems(scenario: str, figures: Mapping[str, float], references: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Every bound that is not kept, as a sentence."""
    told = [bound.problem(figures[bound.figure]) for bound in bounds(scenario, references)]
    return [problem for problem in told if problem]
