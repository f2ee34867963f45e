"""The command `railbus`: finds the subcommand, runs it, and turns what it raises into one line and an exit status.

Subcommands are imported when they are called: `railbus --help` loads neither torch nor nats nor aiohttp.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import click

from railbus.cli import exit_codes
from railbus.cli.session import Session, root_option
from railbus_shared.errors import RailbusError


@dataclass(frozen=True)
class Entry:
    """Where a command lives, and what the overview says of it."""

    target: str
    """`module:name` in this package."""
    help: str


COMMANDS: Final[Mapping[str, Mapping[str, Entry]]] = {
    "Begin": {
        "demo": Entry("demo:demo", "Train a small model, start to end, on this machine."),
        "up": Entry("up:up", "Start NATS and the four services; Ctrl-C stops them cleanly."),
        "doctor": Entry("doctor:doctor", "Check this machine, and say how to mend what is wrong."),
    },
    "Jobs": {
        "submit": Entry("submit:submit", "Submit a job, or a sweep of them, from a YAML or JSON file."),
        "jobs": Entry("jobs:jobs", "List jobs, newest first."),
        "job": Entry("jobs:job", "Show one job and what happened to it."),
        "watch": Entry("watch:watch", "Watch jobs, devices, losses and events on one screen."),
        "why": Entry("why:why", "Say why a job waits, and when it may start."),
        "logs": Entry("logs:logs", "Show what happened, from the log files and live."),
        "cancel": Entry("job_orders:cancel", "Ask jobs to end; they write a checkpoint first."),
        "retry": Entry("job_orders:retry", "Submit jobs that have ended once more."),
        "hold": Entry("job_orders:hold", "Keep waiting jobs from starting."),
        "release": Entry("job_orders:release", "Let jobs start that were held."),
        "priority": Entry("job_orders:priority", "Give a waiting job another priority."),
    },
    "Data, models and devices": {
        "dataset": Entry("dataset:dataset", "Import, look at, verify and export datasets."),
        "checkpoints": Entry("checkpoints:checkpoints", "List, prove, compare and export checkpoints."),
        "checkpoint": Entry("checkpoints:checkpoints", "The same; `checkpoint now JOB` has a running job write one."),
        "devices": Entry("devices:devices", "List devices; take hosts and devices out of service."),
        "lease": Entry("lease:lease", "Hold devices by hand, for a command or a notebook."),
    },
    "Deployments": {
        "init": Entry("init:init", "Make keys, certificates and the configuration of NATS for a deployment."),
        "keys": Entry("keys:keys", "List, add, revoke and replace keys of the bus."),
        "backup": Entry("backup:backup", "Copy the store of a running NATS into a folder."),
        "restore": Entry("restore:restore", "Put a backup into NATS, or accept a store that was put back."),
    },
    "More": {
        "events": Entry("logs:events", "Every event as it is, from the log files or live."),
        "export": Entry("export:export", "Show a job in TensorBoard, or as a trace."),
        "decode": Entry("logs:decode", "Turn a message on stdin into JSON lines."),
        "completion": Entry("topics:completion", "Print a completion script for bash, zsh or fish."),
        "help": Entry("topics:help_topic", "Explain a topic, for instance `exit-codes`."),
    },
}

_EXAMPLES: Final = """\b
  railbus demo                        see it work, from data to checkpoint
  railbus up                          start everything on this machine
  railbus submit job.yaml --follow    train, and watch
"""


class LazyGroup(click.Group):
    """Knows its commands by name, and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_entries())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        entry = _entries().get(cmd_name)
        if entry is None:
            return None
        module, _, name = entry.target.partition(":")
        command = getattr(importlib.import_module(f"railbus.cli.{module}"), name)
        assert isinstance(command, click.Command)  # noqa: S101 - the table above says so
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _entries() and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], _entries(), n=1, cutoff=0.5)
            hint = f"did you mean `railbus {close[0]}`?" if close else "`railbus --help` lists the commands."
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        width = max(len(name) for name in _entries())
        for section, entries in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), entry.help) for name, entry in entries.items()])


def _entries() -> dict[str, Entry]:
    return {name: entry for entries in COMMANDS.values() for name, entry in entries.items()}


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from railbus.cli.topics import print_version

    print_version(as_json="--json" in sys.argv[1:])
    context.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=f"railbus trains PyTorch models from events: publish one job event, it does the rest.\n\n{_EXAMPLES}",
    epilog="Exit codes: railbus help exit-codes. Data goes to stdout, progress and hints to stderr.",
    subcommand_metavar="COMMAND ...",
)
@root_option
@click.option("--traceback", is_flag=True, help="Show where an error came from; also RAILBUS_DEBUG=1.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show it.")
@click.option("--json", "as_json", is_flag=True, hidden=True)
@click.pass_context
def cli(context: click.Context, *, traceback: bool, as_json: bool) -> None:  # noqa: ARG001 - `--version --json`
    """Runs before every command."""
    context.ensure_object(Session).traceback = traceback


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit with its status."""
    arguments = list(sys.argv[1:] if args is None else args)
    wants_traceback = "--traceback" in arguments or os.environ.get("RAILBUS_DEBUG", "") not in {"", "0"}
    if "--traceback" in arguments[1:] and arguments[0] != "--traceback":
        arguments = ["--traceback", *(argument for argument in arguments if argument != "--traceback")]
    sys.exit(_status(arguments, wants_traceback=wants_traceback))


def _status(arguments: list[str], *, wants_traceback: bool) -> int:
    session = Session()
    try:
        result = cli.main(arguments, prog_name="railbus", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except click.exceptions.ClickException as exc:
        exc.show()
        return exit_codes.USAGE
    except RailbusError as exc:
        _show_error(exc, with_traceback=wants_traceback)
        return session.error_status or exit_codes.of_error(exc)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at exit has somewhere to go
        return exit_codes.FAILURE
    except Exception as exc:  # noqa: BLE001 - the last line of defence; the traceback is kept
        return _show_bug(exc, with_traceback=wants_traceback)
    return result if isinstance(result, int) else exit_codes.OK


def _show_error(error: RailbusError, *, with_traceback: bool) -> None:
    if with_traceback:
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True)
    _echo(f"error[{error.details.get('remote_code') or error.code}]", "red", error.message)
    if error.hint:
        _echo("hint", "cyan", error.hint)


def _echo(head: str, colour: str, text: str) -> None:
    from railbus.cli.render import is_plain

    click.echo(f"{head if is_plain(sys.stderr) else click.style(head, fg=colour, bold=True)}: {text}", err=True)


def _show_bug(error: Exception, *, with_traceback: bool) -> int:
    """A bug: its traceback goes to stderr or to a file that is named."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    if with_traceback:
        click.echo(text, err=True)
        where = ""
    else:
        with tempfile.NamedTemporaryFile("w", prefix="railbus-crash-", suffix=".txt", delete=False) as file:
            file.write(text)
        where = f"; the traceback is in {file.name}"
    _echo("error[BUG]", "red", f"{type(error).__name__}: {error}{where}")
    _echo("hint", "cyan", "this is a fault of railbus, not yours; please report it")
    return exit_codes.OUR_TROUBLE


if __name__ == "__main__":
    main()
