"""Which package may import what, and what every package must have; the sources are read, not imported."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[1]
HOMES = {
    "railbus_shared": "shared",
    "railbus": "client",
    "railbus_device_manager": "services/device_manager",
    "railbus_dataloader": "services/dataloader",
    "railbus_telemetry": "services/telemetry",
    "railbus_runner": "services/runner",
}
SERVICES = tuple(name for name, home in HOMES.items() if home.startswith("services/"))
MAY_IMPORT = {"railbus_shared": set[str](), "railbus": set(HOMES), **{name: {"railbus_shared"} for name in SERVICES}}
ONLY_IN = {
    "nats": ("railbus_shared.bus",),
    "pynvml": ("railbus_device_manager.nvml",),
    "torch": ("railbus_runner",),
    "obstore": ("railbus_dataloader.objectstore", "railbus_runner.objects"),
    "click": ("railbus.cli",),
    "rich": ("railbus.cli",),
    "pyarrow": (
        "railbus_shared.data.parquet",
        "railbus_shared.data.parquet_writer",
        "railbus.importers.arrow_columns",
        "railbus.importers.arrow_files",
        "railbus.exporters.parquet",
    ),
    "PIL": ("railbus.importers.image_bytes",),
    "tokenizers": ("railbus.importers.bpe",),
}
MAX_LINES = 400
MAX_FUNCTION_LINES = 40


@dataclass(frozen=True)
class Import:
    """One imported module, as the statement names it."""

    module: str
    line: int
    is_lazy: bool
    """Inside a function, or under `TYPE_CHECKING`: not when the importing module is loaded."""


@dataclass(frozen=True)
class Source:
    """One module of ours."""

    name: str
    path: Path
    text: str

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def place(self) -> str:
        return str(self.path.relative_to(REPO))

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(_imports(self.tree, is_lazy=False))


def _imports(node: ast.AST, *, is_lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, is_lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, is_lazy) for alias in child.names)
        else:
            yield from _imports(child, is_lazy=is_lazy or _is_late(child))


def _is_late(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


@functools.cache
def sources() -> dict[str, Source]:
    """Every module of the six packages, by its dotted name."""
    found = {}
    for home in HOMES.values():
        for path in sorted((REPO / home).rglob("*.py")):
            parts = path.relative_to(REPO / home).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Source(name, path, path.read_text())
    return found


@functools.cache
def project() -> dict[str, Any]:
    return tomllib.loads((REPO / "pyproject.toml").read_text())


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", HOMES)
def test_a_package_imports_only_what_the_direction_allows(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{source.place}:{one.line} imports {one.module}"
        for source in sources().values()
        for one in source.imports
        if source.package == package and (top := one.module.partition(".")[0]) in HOMES and top not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize(("library", "homes"), ONLY_IN.items())
def test_a_library_is_imported_in_its_place_only(library: str, homes: tuple[str, ...]) -> None:
    users = {
        source.name: one.line
        for source in sources().values()
        for one in source.imports
        if _is_within(one.module, library)
    }
    assert users, f"nobody imports {library}: this test guards nothing"
    assert not [f"{name}:{line}" for name, line in users.items() if not any(_is_within(name, home) for home in homes)]


def test_the_public_face_imports_services_only_when_they_are_needed() -> None:
    eager = [
        f"{source.place}:{one.line} imports {one.module}"
        for source in sources().values()
        for one in source.imports
        if source.package == "railbus" and not one.is_lazy and one.module.partition(".")[0] in SERVICES
    ]
    assert not eager


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "railbus_runner"])
def test_a_service_maps_no_file(service: str) -> None:
    """A file that is cut under a map kills whoever touches it; only a trainer may be killed."""
    mapping = ("mmap", "railbus_shared.data.mapping", "railbus_shared.data.mapped", "railbus_shared.data.readers")
    wrong = [
        f"{source.place}:{one.line} imports {one.module}"
        for source in sources().values()
        for one in source.imports
        if source.package == service and any(_is_within(one.module, module) for module in mapping)
    ]
    assert not wrong
    assert "mmap(" not in "".join(source.text for source in sources().values() if source.package == service)


def test_a_runner_loads_torch_in_its_trainers_only() -> None:
    assert "torch" not in _modules_after("import railbus_runner.service")


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        source.name: {_module_of(one.module) for one in source.imports if not one.is_lazy} & sources().keys()
        for source in sources().values()
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as exc:
        pytest.fail(f"these import each other: {' -> '.join(exc.args[1])}")


def _module_of(imported: str) -> str:
    """The module that an import loads: `a.b.c` itself, or `a.b` where `c` is a name in it."""
    return imported if imported in sources() else imported.rpartition(".")[0]


@pytest.mark.parametrize("module", ["torch", "nats", "aiohttp", "numpy", "click"])
def test_importing_railbus_does_not_load(module: str) -> None:
    loaded = _modules_after("import railbus")
    assert module not in loaded


@functools.cache
def _modules_after(statement: str) -> frozenset[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


@pytest.mark.parametrize(("package", "home"), HOMES.items())
def test_a_package_is_typed_and_says_what_it_is(package: str, home: str) -> None:
    assert (REPO / home / package / "py.typed").is_file()
    for source in sources().values():
        if source.package == package:
            assert ast.get_docstring(source.tree), f"{source.place} has no docstring"


@pytest.mark.parametrize("name", [name for name in HOMES if name != "railbus"])
def test_an_init_holds_a_docstring_and_no_code(name: str) -> None:
    inits = [one for one in sources().values() if one.package == name and one.path.name == "__init__.py"]
    assert inits
    assert not [one.place for one in inits if len(one.tree.body) != 1]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_the_same_files_as_every_other(service: str) -> None:
    names = {source.path.name for source in sources().values() if source.package == service}
    assert {"__init__.py", "__main__.py", "settings.py", "service.py"} <= names
    assert (REPO / HOMES[service] / "README.md").is_file()


def test_no_module_is_longer_than_a_reader_bears() -> None:
    lengths = {source.place: len(source.text.splitlines()) for source in sources().values()}
    assert not {place: count for place, count in lengths.items() if count > MAX_LINES}


def test_no_function_is_longer_than_a_reader_bears() -> None:
    lengths = {
        f"{source.place}:{node.name}": _body_lines(node)
        for source in sources().values()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {place: count for place, count in lengths.items() if count > MAX_FUNCTION_LINES}


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, without its signature and its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_nothing_is_mocked() -> None:
    """Fakes of our own protocols live in `tests/fakes.py`; NATS, asyncio and torch are always the real ones."""
    mocking = [
        str(path.relative_to(REPO))
        for path in sorted((REPO / "tests").rglob("*.py"))
        if any(_is_within(one.module, "unittest") for one in _imports(ast.parse(path.read_text()), is_lazy=False))
    ]
    assert not mocking


def test_the_project_file_lists_the_folders_that_there_are() -> None:
    tool = project()["tool"]
    homes, packages = set(HOMES.values()), {f"{home}/{package}" for package, home in HOMES.items()}
    assert {str(path.parent.relative_to(REPO)) for path in REPO.glob("*/*/py.typed")} | {
        str(path.parent.relative_to(REPO)) for path in REPO.glob("services/*/*/py.typed")
    } == packages
    assert set(tool["hatch"]["build"]["dev-mode-dirs"]) == homes
    assert set(tool["hatch"]["build"]["targets"]["wheel"]["packages"]) == packages
    assert set(tool["ruff"]["src"]) - {"tests"} == homes
    assert set(tool["mypy"]["mypy_path"].split(":")) - {"tests"} == homes
    assert set(tool["pyright"]["extraPaths"]) - {"tests"} == homes
    assert set(tool["coverage"]["run"]["source_pkgs"]) == set(HOMES)


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_the_type_checkers_see_every_folder(tool: str) -> None:
    settings = project()["tool"][tool]
    roots = set(settings["files" if tool == "mypy" else "include"])
    assert {home.partition("/")[0] for home in HOMES.values()} <= roots
