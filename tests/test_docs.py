"""The documents say what is true: every page, name, link and example is compared with the code."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from railbus import reference
from railbus.cli import exit_codes
from railbus.cli.main import COMMANDS
from railbus.cli.spec_file import read_jobs
from railbus_shared import contracts
from railbus_shared.contracts.jobs import CheckpointPolicy, JobSpec
from railbus_shared.contracts.model import Contract
from railbus_shared.contracts.waiting import WaitWord
from railbus_shared.errors import RailbusError, known_codes
from railbus_shared.lifecycle import TRANSITIONS
from railbus_shared.settings import CommonSettings
from railbus_shared.subjects import Subjects

REPO = Path(__file__).parents[1]
SERVICES = ("device_manager", "dataloader", "runner", "telemetry")
PAGES = (
    *sorted(REPO.glob("*.md")),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted(REPO.glob("services/*/README.md")),
    *sorted((REPO / "examples").glob("*.md")),
)
NAMES = {page: str(page.relative_to(REPO)) for page in PAGES}
WRITTEN = tuple(page for page in PAGES if page.name not in reference.PAGES)
"""Those that a person wrote."""
EXAMPLE_JOBS = sorted((REPO / "examples").rglob("*.yaml"))

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_PLACES = ("shared", "client", "services", "docs", "examples", "tests", "benchmarks")
_PASTED_JOB = re.compile(r"pub railbus\.jobs\.submit\s*\\?\s*'(\{.*?\})'")
_ENVIRONMENT_OF_THE_COMMAND = {"RAILBUS_NATS_SERVER", "RAILBUS_NATS_NODE", "RAILBUS_DEBUG"}
_TREE_WIDTH = 39
_STREAMS = {"RAILBUS_JOBS", "RAILBUS_EVENTS"}


@functools.cache
def text_of(page: Path) -> str:
    return page.read_text()


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in _FENCE.findall(text_of(page)) if kind == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


# --- the reference pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_reference_page_is_what_the_code_says_now(name: str) -> None:
    assert (REPO / "docs" / name).read_text() == reference.PAGES[name](), "run `make docs`"


@pytest.mark.parametrize("name", reference.PARTS)
def test_the_made_part_of_a_page_is_what_the_code_says_now(name: str) -> None:
    page = (REPO / "docs" / name).read_text()
    assert page == reference.PARTS[name](page), "run `make docs`"


def test_the_picture_of_the_states_shows_every_way_between_them() -> None:
    (picture,) = blocks(REPO / "docs/jobs.md", "mermaid")
    ways = {
        (state, follower)
        for state, row in TRANSITIONS.items()
        for followers in row.values()
        for follower in followers - {state}
    }
    assert set(re.findall(r"(\w+) --> (\w+): ", picture)) == ways


@pytest.mark.parametrize(
    "code", [code for code, kind in known_codes().items() if kind.__module__ == RailbusError.__module__]
)
def test_every_error_code_is_on_its_page(code: str) -> None:
    assert f"| `{code}` |" in text_of(REPO / "docs/errors.md")


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_every_setting_is_on_its_page_with_a_meaning(service: str) -> None:
    settings = importlib.import_module(f"railbus_{service}.settings").Settings if service else CommonSettings
    rows = {row.split("`")[1]: row for row in text_of(REPO / "docs/settings.md").splitlines() if row.startswith("| `")}
    for name in settings.model_fields:
        variable = f"RAILBUS_{service}_{name}" if service else f"RAILBUS_{name}"
        assert len(rows[variable.upper()].rstrip(" |").rpartition("| ")[2]) > 8, variable


def test_every_contract_is_on_its_page_with_all_its_fields() -> None:
    page = text_of(REPO / "docs/messages.md")
    for contract in all_contracts():
        section = page.partition(f"### {contract.__name__}\n")[2].partition("\n#")[0]
        assert section, contract.__name__
        assert [name for name in contract.model_fields if f"| `{name}` |" not in section] == []


def all_contracts() -> list[type[Contract]]:
    modules = [
        importlib.import_module(f"{contracts.__name__}.{one.name}") for one in pkgutil.iter_modules(contracts.__path__)
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return [kind for kind in dict.fromkeys(found) if issubclass(kind, Contract) and kind is not Contract]


# --- commands, variables and paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [name for section in COMMANDS.values() for name in section])
def test_every_command_is_named_in_the_readme(command: str) -> None:
    assert re.search(rf"railbus {command}\b", text_of(REPO / "README.md"))


@pytest.mark.parametrize("page", WRITTEN, ids=NAMES.get)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    known = {name for section in COMMANDS.values() for name in section}
    shown = [
        *_CODE.findall(prose(page)),
        *(line for kind in ("", "sh") for block in blocks(page, kind) for line in block.splitlines()),
    ]
    named = {match[1] for code in shown if (match := re.match(r"\s*railbus ([a-z][a-z-]*)", code))}
    assert named <= known


@pytest.mark.parametrize("page", WRITTEN, ids=NAMES.get)
def test_every_variable_that_a_page_names_is_a_setting(page: Path) -> None:
    named = set(re.findall(r"\bRAILBUS_[A-Z_]*[A-Z]\b", text_of(page)))
    known = set(re.findall(r"`(RAILBUS_\w+)`", text_of(REPO / "docs/settings.md")))
    known |= set(re.findall(r"\$\{(RAILBUS_\w+)", text_of(REPO / "compose.yaml")))
    assert named - known - _ENVIRONMENT_OF_THE_COMMAND - _STREAMS == set()


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = [target.partition("#")[0] for target in _LINK.findall(prose(page)) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", WRITTEN, ids=NAMES.get)
def test_paths_in_the_prose_exist(page: Path) -> None:
    named = [code for code in _CODE.findall(prose(page)) if re.fullmatch(rf"(?:{'|'.join(_PLACES)})/[\w./-]*", code)]
    assert [path for path in named if not (REPO / path).exists()] == []


@pytest.mark.parametrize(
    ("page", "at_least"),
    [
        ("README.md", 10),
        ("docs/jobs.md", 60),
        ("docs/checkpoints.md", 10),
        ("docs/security.md", 30),
        ("services/telemetry/README.md", 20),
    ],
)
def test_every_test_that_a_page_cites_exists_in_the_file_it_links_to(page: str, at_least: int) -> None:
    cited = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", text_of(REPO / page))
    assert len(cited) > at_least
    folder = (REPO / page).parent
    assert [name for name, path in cited if f"def {name}(" not in (folder / path).read_text()] == []


def test_every_folder_of_the_annotated_tree_exists() -> None:
    (tree,) = [block for block in blocks(REPO / "README.md", "") if "shared/railbus_shared/" in block]
    folder = REPO
    for line in tree.splitlines():
        names = line[:_TREE_WIDTH].lstrip("├└─ ").split()
        folder = REPO / names[0] if line[0] not in "├└" else folder
        inside = [folder / name for name in names] if line[0] in "├└" else [folder]
        assert [path for path in inside if not path.exists()] == []


# --- subjects ---------------------------------------------------------------------------------------------------------


def test_the_subjects_of_the_architecture_are_those_that_are_served() -> None:
    subjects = Subjects()
    told = _subjects_of_the_table(text_of(REPO / "docs/architecture.md"))
    served = {f"{subjects.prefix}.req.{one}" for service in SERVICES for one in _endpoints(service)}
    assert {one for one in told if ".req." in one} == served
    assert told - served == {subjects.submit, subjects.event("<area>", "<id>", "<what>")}


@pytest.mark.parametrize("service", SERVICES)
def test_a_services_readme_names_every_request_that_it_answers(service: str) -> None:
    told = _subjects_of_the_table(text_of(REPO / f"services/{service}/README.md").partition("\n## Out")[0])
    assert {f"{Subjects().prefix}.req.{one}" for one in _endpoints(service)} <= told


def test_the_streams_and_buckets_of_the_architecture_are_those_that_are_made() -> None:
    subjects = Subjects()
    buckets = {subjects.jobs, subjects.devices, subjects.leases, subjects.datasets, subjects.leader}
    text = text_of(REPO / "docs/architecture.md")
    assert set(re.findall(r"\brailbus_(?:jobs|devices|leases|datasets|leader|[a-z]+_?kv)\b", text)) == buckets
    assert set(re.findall(r"\bRAILBUS_[A-Z]+\b", text)) == {subjects.jobs_stream, subjects.events_stream}


def _subjects_of_the_table(text: str) -> set[str]:
    """Subjects in rows of tables: `railbus.req.jobs.submit` `.get` names two."""
    found = set()
    for row in text.splitlines():
        whole = ""
        for code in _CODE.findall(row.split("|")[1]) if row.startswith("| `railbus.") else ():
            whole = code if code.startswith("railbus.") else f"{whole.rpartition('.')[0]}{code}"
            found.add(whole)
    return found


def _endpoints(service: str) -> set[str]:
    """`<area>.<verb>` of every `Endpoint(…)` in the service's source."""
    folder = REPO / f"services/{service}/railbus_{service}"
    trees = [ast.parse(path.read_text()) for path in sorted(folder.glob("*.py"))]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    subjects = [call.args[1] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Endpoint"]
    assert subjects, f"{folder} has no endpoints: this test guards nothing"
    return {_endpoint(subject) for subject in subjects}


def _endpoint(subject: ast.expr) -> str:
    assert isinstance(subject, ast.Call), ast.unparse(subject)
    first, verb = subject.args
    assert isinstance(verb, ast.Constant)
    area = {"host": "runner.<host>", "area": "data.<host>", "own": "devices.<host>"}.get(
        ast.unparse(first)
    ) or ast.literal_eval(first)
    return f"{area}.{verb.value!s}"


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("path", EXAMPLE_JOBS, ids=lambda path: path.name)
def test_an_example_is_a_job(path: Path) -> None:
    for spec in read_jobs(path.read_text(), where=str(path)).specs:
        module, colon, function = spec.entrypoint.partition(":")
        if colon:
            assert f"\ndef {function}(" in (path.parent / f"{module}.py").read_text()
            continue
        params = importlib.import_module(f"railbus_runner.entrypoints.{spec.entrypoint}").Params
        assert params.parse(spec.params)


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_yaml_and_json_jobs_in_a_page_are_jobs(page: Path) -> None:
    jobs = [block for block in blocks(page, "yaml") if "entrypoint" in yaml.safe_load(block)]
    jobs += _PASTED_JOB.findall(text_of(page))
    for job in jobs:
        assert all(isinstance(spec, JobSpec) for spec in read_jobs(job, where=str(page)).specs)


def test_the_sweep_that_is_explained_is_the_one_that_is_shipped() -> None:
    shown, policy = blocks(REPO / "docs/jobs.md", "yaml")
    assert CheckpointPolicy.parse(yaml.safe_load(policy)["checkpoint"]).keep_best
    shipped = (REPO / "examples/sweep.yaml").read_text()
    assert read_jobs(shown, where="page") == read_jobs(shipped, where="file")


def test_every_word_for_waiting_and_every_exit_code_of_a_job_is_explained() -> None:
    text = text_of(REPO / "docs/jobs.md")
    assert [word for word in get_args(WaitWord) if f"| `{word}` |" not in text] == []
    codes = {exit_codes.JOB_CANCELLED, exit_codes.JOB_TIME_LIMIT, exit_codes.OUR_TROUBLE, exit_codes.INTERRUPTED}
    assert [code for code in codes if f"| {code} |" not in text] == []


def test_the_readme_shows_a_job_of_each_kind() -> None:
    page = REPO / "README.md"
    assert blocks(page, "yaml")
    pasted = _PASTED_JOB.findall(text_of(page))
    assert {JobSpec.parse(json.loads(job)).model for job in pasted} == {"digits-cnn"}


@pytest.mark.parametrize("path", sorted((REPO / "examples").rglob("*")), ids=lambda path: path.name)
def test_every_example_is_in_their_readme(path: Path) -> None:
    if path.is_file() and path.suffix in {".py", ".yaml"}:
        assert f"({path.relative_to(REPO / 'examples')})" in text_of(REPO / "examples/README.md")
