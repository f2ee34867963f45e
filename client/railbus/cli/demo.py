"""`railbus demo`: everything for real on this machine, from data to checkpoint, and the story of it as it happens.

The supervisor runs in this process and has one thread; the client is a child whose JSON lines are told between ticks.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from railbus.cli import exit_codes
from railbus.cli.render import print_json, to_console
from railbus.cli.session import json_option, root_option, session
from railbus.cli.story import Line
from railbus.cli.tell import Teller

if TYPE_CHECKING:
    from railbus.embedded.supervisor import ServiceEvent, Supervisor

_TICK_S: Final = 0.02
_CHUNK_BYTES: Final = 1 << 16
_NOTED: Final = frozenset({"ended", "killed", "restarting"})


@dataclass
class Client:
    """The child process and what it has told."""

    process: subprocess.Popen[bytes]
    job: str = ""
    record: Mapping[str, object] = field(default_factory=dict)
    error: Mapping[str, object] = field(default_factory=dict)
    accuracy: float | None = None
    _rest: bytes = b""

    def messages(self) -> Iterator[dict[str, object]]:
        """What it has written since the last call; does not wait."""
        import orjson

        assert self.process.stdout is not None  # noqa: S101 - it was started with a pipe
        fd = self.process.stdout.fileno()
        while select.select([fd], [], [], 0)[0]:
            chunk = os.read(fd, _CHUNK_BYTES)
            if not chunk:
                return
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            yield from (orjson.loads(line) for line in lines)

    def go(self) -> None:
        """The bus is there: begin."""
        assert self.process.stdin is not None  # noqa: S101
        try:
            self.process.stdin.write(b"\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended; its last message says why


@click.command()
@click.option("--epochs", type=click.IntRange(1, 1000), default=6, show_default=True, help="Passes over the data.")
@click.option("--keep", is_flag=True, help="Leave everything running afterwards, until Ctrl-C.")
@json_option
@root_option
def demo(*, epochs: int, keep: bool, as_json: bool) -> int:
    """Train a small classifier of handwritten digits on this machine, start to end.

    Starts NATS and the four services, writes a dataset, publishes one job event, and follows it to its checkpoint.
    """
    from railbus.cli.demo_report import report, show_report
    from railbus_shared import clock

    began_s = time.monotonic()
    root = session().layout.root
    teller = Teller(to_console(sys.stderr if as_json else None), begins_at=clock.now(), metrics_s=1.0)
    client, is_interrupted = _live(root, teller, epochs=epochs, keep=keep, as_json=as_json, began_s=began_s)
    if is_interrupted and not client.record:
        return exit_codes.INTERRUPTED
    if keep:
        return exit_codes.OK if client.record.get("state") == "succeeded" else exit_codes.FAILURE
    result = report(root, job=client.job, record=client.record, accuracy=client.accuracy, began_s=began_s)
    if as_json:
        print_json(result.to_map())
    else:
        show_report(result, console=to_console())
    return exit_codes.OK if result.is_good else exit_codes.FAILURE


def _live(root: Path, teller: Teller, *, epochs: int, keep: bool, as_json: bool, began_s: float) -> tuple[Client, bool]:
    """Start, train, stop; returns what the client told, and whether a signal cut it short."""
    from railbus.embedded.supervisor import Options, Supervisor

    supervisor = Supervisor(
        root,
        options=Options(nats_port=0, http_port_base=0),
        on_event=lambda event: _tell_service(event, teller, began_s=began_s),
    )
    teller.say(Line(f"starting NATS and four services on {root}"))
    supervisor.start()
    try:
        client = _start_client(root, epochs=epochs, flushes=keep)
    except BaseException:
        supervisor.stop()
        raise
    try:
        is_done = _train(supervisor, client, teller)
        if is_done and keep:
            _stay(supervisor, client, as_json=as_json, began_s=began_s)
    finally:
        client.process.kill()
        client.process.wait()
        supervisor.stop()
    teller.say(Line("everything has stopped; the log's period is closed", "note"))
    return client, not is_done


def _start_client(root: Path, *, epochs: int, flushes: bool) -> Client:
    from railbus.embedded.process import die_with_parent

    parent = os.getpid()
    command = [sys.executable, "-m", "railbus.cli.demo_client", str(root), str(epochs), "1" if flushes else "0"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - this process has one thread
    )
    return Client(process)


def _train(supervisor: Supervisor, client: Client, teller: Teller) -> bool:
    """Tick until the client has ended; False if a signal came before."""
    from railbus.embedded.supervisor import READY_S

    has_begun = False
    deadline_s = time.monotonic() + READY_S
    while client.process.poll() is None:
        if not supervisor.tick(_TICK_S, is_starting=not has_begun):
            return False
        if not has_begun and supervisor.num_ready == len(supervisor.health_urls):
            has_begun = True
            client.go()
        elif not has_begun and time.monotonic() > deadline_s:
            supervisor.wait_ready(timeout_s=0)  # raises, saying which service is late
        _tell_all(client, teller)
    _tell_all(client, teller)
    _raise_error(client)
    return True


def _raise_error(client: Client) -> None:
    from railbus_shared.errors import RailbusError, error_from_wire

    if client.error:
        raise error_from_wire(client.error)
    if not client.record:
        raise RailbusError(f"the demo's client ended with status {client.process.returncode}", hint="see stderr")


def _tell_all(client: Client, teller: Teller) -> None:
    for message in client.messages():
        match message:
            case {"event": dict(event)}:
                _note_accuracy(client, event)
                teller.tell(event)
            case {"say": str(text)}:
                teller.say(Line(text, "good"))
            case {"job": str(job), "subject": subject, "bytes": size}:
                client.job = job
                teller.say(Line(f"published job {job}: {size} bytes of JSON on {subject}", "good"))
            case {"end": dict(record)}:
                client.record = record
            case {"error": dict(error)}:
                client.error = error


def _note_accuracy(client: Client, event: Mapping[str, object]) -> None:
    match event:
        case {"type": "train.metrics", "data": {"accuracy": float(accuracy)}}:
            client.accuracy = accuracy


def _tell_service(event: ServiceEvent, teller: Teller, *, began_s: float) -> None:
    if event.what == "ready":
        teller.say(Line(f"{event.name} ready after {time.monotonic() - began_s:.2f} s  {event.detail}", "good"))
    elif event.what in _NOTED:
        teller.say(
            Line(f"{event.name} {event.what} {event.detail}".rstrip(), "bad" if event.what != "restarting" else "note")
        )


def _stay(supervisor: Supervisor, client: Client, *, as_json: bool, began_s: float) -> None:
    """Show the report, and keep everything running until a signal."""
    from railbus.cli.demo_report import report, show_report

    result = report(
        supervisor.paths.root, job=client.job, record=client.record, accuracy=client.accuracy, began_s=began_s
    )
    if as_json:
        print_json(result.to_map())
    else:
        show_report(result, console=to_console())
    click.echo(f"everything still runs at {supervisor.server.url}; Ctrl-C stops it", err=True)
    while supervisor.tick(1.0):
        pass
