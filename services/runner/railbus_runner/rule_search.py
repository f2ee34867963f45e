"""Search lines for patterns, as a program of its own that can be killed; imports nothing of ours.

In: `{"patterns": […], "lines": […]}` on standard input. Out: the numbers of the first pattern that matches and of the
last line that it matches, or `[]`.
"""

from __future__ import annotations

import json
import re
import sys


def main() -> int:
    asked = json.load(sys.stdin)
    json.dump(first_match(asked["patterns"], asked["lines"]), sys.stdout)
    return 0


def first_match(patterns: list[str], lines: list[str]) -> list[int]:
    """Empty if nothing matches."""
    for number, text in enumerate(patterns):
        pattern = re.compile(text)
        for place in range(len(lines) - 1, -1, -1):
            if pattern.search(lines[place]):
                return [number, place]
    return []


if __name__ == "__main__":
    sys.exit(main())
