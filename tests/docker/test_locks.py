"""The hashed locks of the images say what pyproject.toml and constraints.txt say; `make lock` writes them anew."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
EXTRAS = {"telemetry": "", "dataloader": "objects", "device_manager": "device-manager", "runner": "runner"}
"""What each image has beside the dependencies of all."""
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}


def _pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", path.read_text(), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def _declared(extra: str) -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [
        Requirement(line)
        for line in (*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ()))
    ]


def _closure(extra: str) -> set[str]:
    """What must be installed for a set of extras, as the metadata of what is installed here tell; torch apart."""
    names: set[str] = set()
    waiting = _declared(extra)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in names or (requirement.marker and not requirement.marker.evaluate(LINUX)):
            continue
        names.add(name)
        waiting += [Requirement(line) for line in importlib.metadata.requires(name) or ()]
    return {name for name in names if not re.match(r"(torch|triton|cuda-.*|nvidia-(?!ml-py).*)$", name)}


@pytest.mark.parametrize("image", EXTRAS)
def test_a_lock_has_what_the_image_needs_and_nothing_else(image: str) -> None:
    assert set(_pins(REPOSITORY / "locks" / f"{image}.txt")) == _closure(EXTRAS[image])


@pytest.mark.parametrize("image", EXTRAS)
def test_a_lock_has_the_versions_that_we_test_with(image: str) -> None:
    pins, constraints = _pins(REPOSITORY / "locks" / f"{image}.txt"), _pins(REPOSITORY / "constraints.txt")
    assert {name: pins[name] for name in pins if name in constraints} == {
        name: constraints[name] for name in pins if name in constraints
    }
    assert set(pins) - set(constraints) <= {"setuptools"}  # of torch, which takes any
    for requirement in _declared(EXTRAS[image]):
        name = canonicalize_name(requirement.name)
        assert name == "torch" or requirement.specifier.contains(pins[name]), requirement


@pytest.mark.parametrize("lock", [*EXTRAS, "build"])
def test_every_package_of_a_lock_has_hashes(lock: str) -> None:
    entries = re.split(r"^(?=[a-z])", (REPOSITORY / "locks" / f"{lock}.txt").read_text(), flags=re.MULTILINE)[1:]
    assert entries
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_images_install_by_hash_and_torch_alone_by_version() -> None:
    """Not a word of the Dockerfile installs a package in another way."""
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    installs = [line for line in text.splitlines() if "pip install" in line]
    ours = [line for line in installs if "--no-deps" in line and line.endswith(" .")]
    torch = [line for line in installs if "--constraint constraints.txt torch" in line]
    locked = [line for line in installs if "--require-hashes" in line]
    assert (len(ours), len(torch)) == (1, 1)
    assert set(installs) == {*ours, *torch, *locked}
    assert "torch==" in (REPOSITORY / "constraints.txt").read_text()
