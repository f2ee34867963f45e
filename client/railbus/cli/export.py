"""`railbus export`: a job in the form of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from railbus.cli import exit_codes
from railbus.cli.job_names import find_job, job_id
from railbus.cli.render import print_json
from railbus.cli.session import connected, exit_with_code_of_another, json_option, root_option, run, session

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus.tensorboard import RunFile

_TO: Final = Path("runs")


@click.group()
def export() -> None:
    """Show a job in other programs.

    \b
      railbus export tensorboard @last
      railbus export tensorboard -f j-77732b-1       as it trains
      railbus export trace @last                     what took how long
    """


@export.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Go on as it trains, until its end; Ctrl-C only leaves.")
@click.option("--to", type=click.Path(path_type=Path), default=_TO, show_default=True, metavar="DIR",
              help="Folder of runs; the job's is one below it.")  # fmt: skip
@json_option
@root_option
def tensorboard(*, job: str, follow: bool, to: Path, as_json: bool) -> int:
    """Write a job's metrics and texts as a run of TensorBoard, from its beginning, over an earlier one.

    Reads the log files where they are on this host, else what the stream still holds. With -f it exits with the job's
    own code.

    \b
      railbus export tensorboard -f @last &
      tensorboard --logdir runs
    """
    if follow:
        exit_with_code_of_another()
        return run(_follow(job, to, as_json=as_json))
    run(_export(job, to, as_json=as_json))
    return exit_codes.OK


@export.command()
@click.argument("job")
@click.option("--format", "form", type=click.Choice(["perfetto", "otlp"]), default="perfetto", show_default=True,
              help="For ui.perfetto.dev and chrome://tracing, or a line of OTLP JSON.")  # fmt: skip
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), metavar="FILE",
              help="By default JOB.trace.json; `-` is stdout.")  # fmt: skip
@root_option
def trace(*, job: str, form: str, to: Path | None) -> None:
    """Write what took how long in a job, from its submission to its end, over an earlier file.

    It is made of the job's events, so that no collector need run; one that does gets the same spans by itself, where
    RAILBUS_TELEMETRY_OTLP_ENDPOINT is set. Of a job that goes on, what has not ended yet ends with the last event.

    \b
      railbus export trace @last
      railbus export trace @last --format otlp --to - |
        curl -sd @- -H 'content-type: application/json' http://127.0.0.1:4318/v1/traces
    """
    run(_export_trace(job, form, to))


async def _export_trace(wanted: str, form: str, to: Path | None) -> None:
    import orjson

    from railbus.interchange import chrome_trace
    from railbus_shared.errors import NotFound
    from railbus_shared.files import write_whole
    from railbus_shared.otlp import traces
    from railbus_shared.spans import spans_of

    job = await job_id(wanted)
    spans = spans_of(await _facts(job))
    if not spans:
        raise NotFound(f"of job {job!r} nothing is written down", hint="give another --root, or start telemetry")
    data = orjson.dumps(traces(spans) if form == "otlp" else chrome_trace(spans)) + b"\n"
    path = to or Path(f"{job}.trace.json")
    if str(path) == "-":
        click.echo(data.decode(), nl=False)
        return
    write_whole(path.absolute(), data)
    click.echo(path)
    click.echo(f"{len(spans)} spans of trace {spans[0].context.trace_id}", err=True)


async def _facts(job: str) -> list[dict[str, object]]:
    """Events that spans are made of: of the files, or from telemetry, which gives the newest thousand."""
    from railbus_shared.contracts.logs import QueryEvents
    from railbus_shared.log_reader import read_events
    from railbus_shared.spans import AREAS, is_wanted

    layout = session().layout
    if layout.logs.is_dir():
        return [one for one in read_events(layout, job=job, types=AREAS) if is_wanted(str(one["type"]))]
    async with connected() as client:
        return list((await client.events(QueryEvents(job=job, types=AREAS, limit=1000))).events)


async def _export(wanted: str, to: Path, *, as_json: bool) -> None:
    from railbus.tensorboard import RunFile
    from railbus_shared.errors import NotFound

    if session().layout.logs.is_dir():
        job = await job_id(wanted)
        file = RunFile(to / job)
        with file.begun():
            _write_history(file, job)
    else:
        async with connected() as client:
            record = await find_job(client, wanted)
            job, file = record.id, RunFile(to / record.id)
            if not record.is_final:
                raise NotFound(f"job {job!r} goes on, and its log files are not on this host", hint="follow it with -f")
            await _write_live(file, client, job)
    _tell(job, file, as_json=as_json)


async def _follow(wanted: str, to: Path, *, as_json: bool) -> int:
    """What the files hold, then what the stream does; what both hold is written once."""
    from railbus.tensorboard import RunFile

    async with connected() as client:
        job = (await find_job(client, wanted)).id
        file = RunFile(to / job)
        click.echo(f"following job {job}; tensorboard --logdir {to}", err=True)
        await _write_live(file, client, job)
        (record,) = await client.wait([job])
    _tell(job, file, as_json=as_json)
    return exit_codes.of_record(record)


async def _write_live(file: RunFile, client: Client, job: str) -> None:
    with file.begun():
        _write_history(file, job)
        async for event in client.follow(job):
            file.write(event)
            file.flush()


def _write_history(file: RunFile, job: str) -> None:
    from railbus.tensorboard import TYPES
    from railbus_shared.log_reader import read_events

    layout = session().layout
    for event in read_events(layout, job=job, types=TYPES) if layout.logs.is_dir() else ():
        file.write(event)
    file.publish()


def _tell(job: str, file: RunFile, *, as_json: bool) -> None:
    points, tags = file.records.points, sorted(file.records.tags)
    if as_json:
        print_json({"job": job, "path": str(file.path), "points": points, "metrics": tags})
        return
    click.echo(file.path)
    click.echo(f"{points:,} points of {', '.join(tags) or 'no metric'}", err=True)
