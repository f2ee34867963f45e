"""The command's overview, and what it must not load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from railbus.cli import exit_codes
from railbus.cli.main import COMMANDS, cli
from railbus_shared.errors import known_codes

_HEAVY = ("torch", "nats", "aiohttp", "pydantic_settings", "numpy", "rich", "yaml", "asyncio")
_LOADED = """
import sys
from railbus.cli.main import main
try:
    main({arguments!r})
except SystemExit as exc:
    assert exc.code == 0, exc.code
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--version", "--json"], ["help", "exit-codes"]])
def test_the_overview_loads_nothing_heavy(arguments: list[str]) -> None:
    code = _LOADED.format(arguments=arguments, heavy=_HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert done.stdout


@pytest.mark.parametrize("words", [[], *([name] for section in COMMANDS.values() for name in section)])
def test_every_command_explains_itself_within_80_columns(words: list[str]) -> None:
    shown = CliRunner().invoke(cli, [*words, "--help"], terminal_width=80)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("Usage: ")
    assert max(len(line) for line in shown.output.splitlines()) <= 80


@pytest.mark.parametrize("name", ["import", "append", "export", "list", "show", "sample", "stats", "verify", "repair"])
def test_every_command_for_datasets_explains_itself_within_80_columns(name: str) -> None:
    shown = CliRunner().invoke(cli, ["dataset", name, "--help"], terminal_width=80)
    assert shown.exit_code == 0, shown.output
    assert max(len(line) for line in shown.output.splitlines()) <= 80


@pytest.mark.parametrize("name", ["list", "ls", "show", "verify", "diff", "export", "consolidate", "prune"])
def test_every_command_for_checkpoints_explains_itself_within_80_columns(name: str) -> None:
    shown = CliRunner().invoke(cli, ["checkpoints", name, "--help"], terminal_width=80)
    assert shown.exit_code == 0, shown.output
    assert max(len(line) for line in shown.output.splitlines()) <= 80


@pytest.mark.parametrize(
    "words", ["devices drain", "devices cordon", "devices list", "lease run", "lease list", "lease release"]
)
def test_every_command_for_devices_explains_itself_within_80_columns(words: str) -> None:
    shown = CliRunner().invoke(cli, [*words.split(), "--help"], terminal_width=80)
    assert shown.exit_code == 0, shown.output
    assert max(len(line) for line in shown.output.splitlines()) <= 80


@pytest.mark.parametrize(
    ("group", "commands"),
    [
        ("dataset", ["import", "append", "export", "list", "show", "sample", "stats", "verify", "repair"]),
        ("checkpoints", ["list", "show", "verify", "diff", "export", "consolidate", "prune", "now"]),
        ("checkpoint", ["now"]),
        ("devices", ["list", "drain", "undrain", "cordon", "uncordon"]),
        ("lease", ["run", "list", "release"]),
    ],
)
def test_groups_show_their_commands(group: str, commands: list[str]) -> None:
    shown = CliRunner().invoke(cli, [group, "--help"])
    assert all(f"\n  {command} " in shown.output for command in commands), shown.output


@pytest.mark.parametrize(
    ("typed", "meant"), [("subimt", "submit"), ("checkpionts", "checkpoints"), ("device", "devices"), ("log", "logs")]
)
def test_a_mistyped_command_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    shown = CliRunner().invoke(cli, [typed])
    assert shown.exit_code == exit_codes.USAGE
    assert f"did you mean `railbus {meant}`?" in shown.output


def test_the_version_as_json_names_what_railbus_stands_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "railbus.cli.main", "--version", "--json"], capture_output=True, text=True, check=True
    )
    assert {"railbus", "python", "nats-py", "torch"} <= set(json.loads(done.stdout))


def test_every_exit_code_is_explained() -> None:
    shown = CliRunner().invoke(cli, ["help", "exit-codes"]).output
    used = {
        value
        for name, value in vars(exit_codes).items()
        if name[0].isalpha() and name.isupper() and isinstance(value, int)
    }
    table, _, of_a_job = shown.partition("\n\n")
    assert used == {int(line.split()[0]) for line in table.splitlines()}
    assert "`submit --wait`" in of_a_job
    assert max(len(line) for line in shown.splitlines()) <= 90


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("NOT_AUTHORIZED", 4),
        ("BAD_SETTING", 2),
        ("ALREADY_RUNNING", 2),
        ("JOB_NOT_FOUND", 3),
        ("CHECKPOINT_NOT_FOUND", 3),
        ("BUS_UNAVAILABLE", 5),
        ("NO_RESPONDER", 5),
        ("REQUEST_TIMEOUT", 7),
        ("INVALID_FIELD", 6),
        ("UNKNOWN_ENTRYPOINT", 6),
        ("SHARD_CORRUPT", 6),
        ("CONFLICT", 1),
        ("STORAGE_FULL", 1),
    ],
)
def test_errors_end_with_the_documented_status(code: str, status: int) -> None:
    kind = known_codes()[code]
    assert exit_codes.of_error(kind.__new__(kind)) == status


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str) -> None:
    shown = CliRunner().invoke(cli, ["completion", shell])
    assert shown.exit_code == 0
    assert "_RAILBUS_COMPLETE" in shown.output
