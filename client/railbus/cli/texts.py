"""Text of others among ours: a terminal obeys no symbol of it, and its lines are told from those of the log."""

from __future__ import annotations

import re
from typing import Final

_SHOWN: Final = 2000
_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
"""Colours, movements of the cursor and titles, which a program writes for its own terminal."""
_BAR: Final = "    |"


def visible(symbol: str) -> str:
    """The symbol, or a stand-in for one that a terminal would obey."""
    return symbol if symbol.isprintable() else "\N{REPLACEMENT CHARACTER}"


def one_line(text: str) -> str:
    """Text of others within a line of ours: without escapes and tabs, its ends of lines as stand-ins."""
    return "".join(map(visible, _ESCAPES.sub("", text).expandtabs(4)))


def quoted(text: str, *, newest: bool = False) -> list[str]:
    """Lines of text behind a bar; of a long one the beginning, or the end, and how much that leaves out."""
    text = text.strip("\n").expandtabs(4)
    if not text and newest:
        return []
    left_out = len(text) - _SHOWN
    shown = text[-_SHOWN:] if newest else text[:_SHOWN]
    lines = ["".join(map(visible, line)).rstrip() for line in shown.split("\n")]
    if left_out > 0:
        lines.insert(0 if newest else len(lines), f"… {'' if newest else 'and '}{left_out:,} characters more")
    return [f"{_BAR} {line}".rstrip() for line in lines]


def shortened(text: str, most: int) -> str:
    """The text with the end of each line that is longer left out, and counted."""
    return "\n".join(
        line if len(line) <= most else f"{line[:most]}… {len(line) - most:,} characters more"
        for line in text.split("\n")
    )


def set_apart(text: str) -> str:
    """A line of ours in which others have a word: without escapes, and further lines behind a bar."""
    first, *rest = _ESCAPES.sub("", text).expandtabs(4).split("\n")
    return "\n".join(
        "".join(map(visible, line))
        for line in (first, *(one if one.startswith(_BAR) else f"{_BAR} {one}" for one in rest))
    )
