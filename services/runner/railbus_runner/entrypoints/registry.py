"""From the name of an entrypoint to its function: a built-in's short name, or `package.module:function`.

A user's module counts only if its file lies, links followed, in one of the folders that the runner allows; those
folders come first on the import path only then. Listing what there is imports nothing.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, cast

from railbus_shared.errors import UnknownEntrypoint, shorten
from railbus_shared.names import checked_entrypoint

if TYPE_CHECKING:
    from railbus_runner.context import TrainContext

logger = logging.getLogger(__name__)

Entrypoint = Callable[["TrainContext"], None]

BUILTIN: Final = {
    "causal_lm": "railbus_runner.entrypoints.causal_lm:train",
    "classifier": "railbus_runner.entrypoints.classifier:train",
}
MAX_LISTED: Final = 1000
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_SHOWN: Final = 8


def resolve(name: str, dirs: Sequence[Path]) -> Entrypoint:
    """The function of this name; imports its module. Raises UnknownEntrypoint, and whatever the import raises."""
    checked_entrypoint(name)
    if name in BUILTIN:
        module_name, _, function = BUILTIN[name].partition(":")
        return cast("Entrypoint", getattr(importlib.import_module(module_name), function))
    module_name, colon, function = name.partition(":")
    file = module_file(module_name, dirs) if colon else None
    if file is None:
        raise _unknown(name, dirs)
    found = getattr(_import(module_name, file, dirs), function, None)
    if not callable(found):
        raise _unknown(name, dirs)
    return cast("Entrypoint", found)


def available(dirs: Sequence[Path]) -> list[str]:
    """Built-ins, then functions of the folders that take one positional argument; at most a thousand, sorted."""
    names = sorted(BUILTIN)
    for folder in dirs:
        for file in _python_files(folder):
            module = _module_name(file.relative_to(folder))
            if module is None or not _lies_in(file, folder):
                continue
            names += (f"{module}:{function}" for function in _functions(file))
            if len(names) >= MAX_LISTED:
                return names[:MAX_LISTED]
    return names


def module_file(module: str, dirs: Sequence[Path]) -> Path | None:
    """The real path of a module's file, if it lies in one of the folders."""
    parts = module.split(".")
    for folder in dirs:
        for relative in (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")):
            if (folder / relative).is_file() and _lies_in(folder / relative, folder):
                return (folder / relative).resolve()
    return None


def _import(module_name: str, file: Path, dirs: Sequence[Path]) -> ModuleType:
    for folder in reversed(dirs):
        path = str(folder.resolve())
        sys.path[:] = [path, *(entry for entry in sys.path if entry != path)]
    importlib.invalidate_caches()
    module = importlib.import_module(module_name)
    if module.__file__ is None or Path(module.__file__).resolve() != file:
        raise UnknownEntrypoint(
            f"module {module_name!r} is {module.__file__ or 'built into Python'}, not {str(file)!r}",
            hint="rename the file: another module of this name comes first",
        )
    return module


def _unknown(name: str, dirs: Sequence[Path]) -> UnknownEntrypoint:
    known = available(dirs)
    close = difflib.get_close_matches(name, known, n=1)
    shown = ", ".join(known[:_MAX_SHOWN]) + (f" and {len(known) - _MAX_SHOWN} more" if len(known) > _MAX_SHOWN else "")
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UnknownEntrypoint(
        f"field 'entrypoint' has value {shorten(name)}: there is none", hint=f"{hint}known: {shown}"
    )


def _lies_in(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def _python_files(folder: Path) -> Iterator[Path]:
    """Sorted; hidden folders, caches and virtual environments are left out."""
    for path, subfolders, names in os.walk(folder):
        inside = Path(path)
        subfolders[:] = sorted(name for name in subfolders if name.isidentifier() and name != "__pycache__")
        if (inside / "pyvenv.cfg").exists():
            subfolders.clear()
            continue
        yield from (inside / name for name in sorted(names) if name.endswith(".py"))


def _module_name(relative: Path) -> str | None:
    """`package.module`; None where a name cannot be imported."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts) if parts and all(part.isidentifier() and part.isascii() for part in parts) else None


def _functions(file: Path) -> list[str]:
    """Names of the functions of a file that may be entrypoints; none of one that cannot be parsed."""
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            return []
        with warnings.catch_warnings(action="ignore"):  # of the style of a file that is only looked at
            tree = ast.parse(file.read_bytes(), filename=str(file))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        logger.warning(
            "a file of the entrypoint folders cannot be read", extra={"file": str(file), "problem": str(exc)}
        )
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _takes_one(node)]


def _takes_one(function: ast.FunctionDef) -> bool:
    """Whether it is public and is called with exactly one positional argument."""
    given = function.args
    is_plain = not (given.vararg or given.kwarg or given.kwonlyargs or given.defaults)
    return is_plain and len(given.posonlyargs) + len(given.args) == 1 and not function.name.startswith("_")
