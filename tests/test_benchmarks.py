"""The benchmarks can be found, and say so where a name is none of theirs; they run by hand, for they take minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "    tell(" in path.read_text())


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_unknown_name_is_answered_with_all_names() -> None:
    done = _run("-m", "benchmarks", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert sorted(done.stderr.rpartition(": ")[2].strip().split(", ")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_benchmarks_describes(name: str) -> None:
    assert f"python -m benchmarks {name}" in (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("values", "frac", "expected"),
    [([1.0], 0.9, 1.0), ([3.0, 1.0, 2.0], 1.0, 3.0), ([*map(float, range(1, 11))], 0.9, 9.0), ([1.0, 2.0], 0.5, 1.0)],
)
def test_a_quantile_is_the_least_value_that_the_share_does_not_exceed(
    values: list[float], frac: float, expected: float
) -> None:
    code = f"from benchmarks.results import quantile; print(quantile({values}, {frac}))"
    assert json.loads(_run("-c", code).stdout) == expected
