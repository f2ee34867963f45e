"""The configuration for rsyslog ships every line of the log, over rotations, restarts and kills; with the real rsyslog.

Where it is not installed these are skipped, and counted as that: `apt-get install rsyslog`.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus_shared import clock, wire
from railbus_shared.layout import Layout
from railbus_telemetry.lines import batch
from railbus_telemetry.runs import Run
from railbus_telemetry.series import LogSeries
from until import PATIENCE_S, until

CONFIG = Path(__file__).parents[2] / "deploy/shipping/rsyslog.conf"
RSYSLOGD = shutil.which("rsyslogd") or "/usr/sbin/rsyslogd"
SHIPPED_S = 60.0
HALF_HOUR_NS = 1800 * clock.NS_PER_S

pytestmark = [
    pytest.mark.skipif(not Path(RSYSLOGD).exists(), reason="rsyslog is not installed"),
    pytest.mark.timeout(90),  # a busy machine, and rsyslog takes its time to end
]


class Collector:
    """Where lines are shipped to: a TCP port that keeps whatever comes."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def numbers(self) -> list[int]:
        return [int(json.loads(line)["number"]) for line in list(self.lines)]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file, contextlib.suppress(OSError):
            for line in file:
                self.lines.append(line)


class Shipper:
    """A real rsyslogd with our configuration, its paths and target exchanged."""

    def __init__(self, folder: Path, layout: Layout, port: int) -> None:
        self._folder = folder
        (folder / "spool").mkdir(parents=True)
        text = CONFIG.read_text()
        for before, after in {
            "/var/lib/railbus/learning": str(layout.root),
            "/var/spool/rsyslog": str(folder / "spool"),
            "logs.example.org": "127.0.0.1",
            'port="5170"': f'port="{port}"',
        }.items():
            assert before in text
            text = text.replace(before, after)
        self._config = folder / "rsyslog.conf"
        self._config.write_text(text)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [RSYSLOGD, "-n", "-f", str(self._config), "-i", str(self._folder / "pid")],
                stdout=output,
                stderr=output,
            )

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE_S)
            self._process = None
            (self._folder / "pid").unlink(missing_ok=True)


class Writer:
    """The log as telemetry writes it; its time goes on when it is told."""

    def __init__(self, layout: Layout) -> None:
        layout.logs.mkdir(parents=True)
        self.now_ns = clock.parse_rfc3339("2026-11-23T21:10:00Z")
        self.written = 0
        self._random = random.Random(7)
        self._series = LogSeries(layout, rotation="hourly", incarnation="4f09ac", now_ns=lambda: self.now_ns)

    def write(self, batches: int = 6) -> None:
        for _ in range(batches):
            self._series.append(self._lines(self._random.randint(1, 40)))
            time.sleep(0.01)  # so that rsyslog reads while it is written

    def end_period(self, *, writes: bool = False) -> None:
        """The plain file goes at once after its last line was written; it is two hours later, at last another day.

        With `writes` more lines come while it is being closed.
        """
        self.now_ns += 4 * HALF_HOUR_NS
        work = [self.write] if writes else []
        assert self._series.rotate(self.now_ns, is_stopping=lambda: bool(work and work.pop()()))

    def _lines(self, count: int) -> list[Run]:
        events = []
        for _ in range(count):
            self.written += 1
            padding = "x" * self._random.choice((0, 50, 20_000))
            about = {"id": f"p-1-{self.written}", "type": "train.metrics", "time": clock.rfc3339(self.now_ns)}
            key = {"producer": "p-1", "number": self.written, "source": "test", "host": "h"}
            events.append({**about, **key, "data": {"pad": padding}})
        message = wire.encode({"v": 1, "common": {}, "events": events})
        return list(batch([(1, "railbus.evt.train.j-1.metrics", message)], incarnation="4f09ac", telemetry="t-1"))


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def shipper(tmp_path: Path, layout: Layout, collector: Collector) -> Iterator[Shipper]:
    shipper = Shipper(tmp_path / "rsyslog", layout, collector.port)
    yield shipper
    shipper.end()


async def wait_for_all(writer: Writer, collector: Collector) -> None:
    await until(lambda: len(set(collector.numbers())) == writer.written, seconds=SHIPPED_S)


async def test_every_line_arrives_once_over_rotations_and_over_midnight(
    layout: Layout, shipper: Shipper, collector: Collector
) -> None:
    writer = Writer(layout)
    writer.write()  # what is there before rsyslog is shipped as well
    shipper.start()
    await wait_for_all(writer, collector)
    for _ in range(5):
        writer.end_period()
        writer.write()
    await wait_for_all(writer, collector)
    assert sorted(collector.numbers()) == list(range(1, writer.written + 1))
    assert len({json.loads(line)["time"][:10] for line in collector.lines}) == 2
    assert max(map(len, collector.lines)) > 20_000


async def test_what_comes_while_a_period_is_closed_arrives_once(
    layout: Layout, shipper: Shipper, collector: Collector
) -> None:
    writer = Writer(layout)
    shipper.start()
    writer.write()
    await wait_for_all(writer, collector)
    for _ in range(5):
        writer.end_period(writes=True)
        writer.write()
    await wait_for_all(writer, collector)
    assert sorted(collector.numbers()) == list(range(1, writer.written + 1))


async def test_a_restart_goes_on_where_it_was_and_a_kill_repeats_but_loses_nothing(
    layout: Layout, shipper: Shipper, collector: Collector
) -> None:
    writer = Writer(layout)
    shipper.start()
    writer.write()
    await wait_for_all(writer, collector)
    shipper.end()
    writer.write()
    shipper.start()
    await wait_for_all(writer, collector)
    assert len(collector.numbers()) == writer.written
    writer.write()
    shipper.end(signal.SIGKILL)
    writer.write()
    shipper.start()
    await wait_for_all(writer, collector)
    writer.end_period()
    writer.write()
    await wait_for_all(writer, collector)


async def test_what_was_closed_while_nobody_shipped_is_in_the_days_file_and_can_be_sent_anew(
    layout: Layout, shipper: Shipper, collector: Collector
) -> None:
    writer = Writer(layout)
    shipper.start()
    writer.write()
    await wait_for_all(writer, collector)
    shipper.end()
    writer.write()
    writer.end_period()
    shipper.start()
    writer.write()
    files = " ".join(map(str, sorted(layout.logs.glob("*/*/*/trainer.log.jsonl.gz"))))
    subprocess.run(["/bin/bash", "-c", f"zcat {files} > /dev/tcp/127.0.0.1/{collector.port}"], check=True)
    await wait_for_all(writer, collector)
    assert len(collector.numbers()) > writer.written, "what had arrived before was sent again, under the same keys"
