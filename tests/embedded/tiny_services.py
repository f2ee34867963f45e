"""Four real, tiny services, and a `railbus up` of them: `python tiny_services.py ROOT [WISH=…]…`.

Wishes are `drain_s` and `ready_s` in seconds, and `http=usual` for the ports that a user gets.

Each writes its run file, serves /readyz, and on SIGTERM notes its name in `<run>/drained` and ends. A file
`<run>/<name>.<word>` changes that: `stubborn` ignores SIGTERM, `unready` answers 503, `crash` ends at its start with
the status in the file, `slow` takes 0.2 s to drain.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from railbus.embedded.services import ServiceSpec
from railbus.embedded.supervisor import Options
from railbus.embedded.up import up
from railbus_shared.errors import RailbusError


def _serve(name: str) -> int:
    run = Path(os.environ["RAILBUS_RUN_DIR"])

    def wish(word: str) -> Path:
        return run / f"{name}.{word}"

    if wish("crash").exists():
        print(json.dumps({"event": "cannot run", "message": f"{name} lacks a setting", "hint": "set it"}), flush=True)
        return int(wish("crash").read_text())
    told = threading.Event()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if wish("stubborn").exists() else lambda *_: told.set())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if wish("unready").exists() else 200)
            self.end_headers()
            self.wfile.write(b"[-]work: there is none\n")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
            """The log is for other things."""

    server = HTTPServer(("127.0.0.1", int(os.environ[f"RAILBUS_{name.upper()}_HTTP_PORT"])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    facts = {key: value for key, value in os.environ.items() if key.startswith("RAILBUS_")}
    wish("facts").write_text(
        json.dumps({**facts, "sid": os.getsid(0), "stdin": str(Path("/proc/self/fd/0").readlink())})
    )
    print(f"{name} speaks", flush=True)
    whole = {"pid": os.getpid(), "http_url": f"http://127.0.0.1:{server.server_port}"}
    wish("tmp").write_text(json.dumps(whole))
    wish("tmp").rename(run / f"{name}.json")
    while not told.wait(0.1):
        """Where another thread takes the signal, nothing ends a wait without end."""
    if wish("slow").exists():
        time.sleep(0.2)
    with (run / "drained").open("a") as drained:
        drained.write(f"{name}\n")
    return 0


device_manager = functools.partial(_serve, "device_manager")
dataloader = functools.partial(_serve, "dataloader")
runner = functools.partial(_serve, "runner")
telemetry = functools.partial(_serve, "telemetry")

SERVICES = (
    ServiceSpec("device_manager", "tiny_services:device_manager", 1),
    ServiceSpec("dataloader", "tiny_services:dataloader", 1, 1),
    ServiceSpec("runner", "tiny_services:runner", 0, 2),
    ServiceSpec("telemetry", "tiny_services:telemetry", 2, 3),
)


def main(arguments: list[str]) -> int:
    wishes = dict(argument.split("=", 1) for argument in arguments[1:])
    options = Options(
        nats_port=0,
        http_port_base=None if wishes.get("http") == "usual" else 0,
        services=SERVICES,
        drain_s=float(wishes.get("drain_s", "20")),
        env={"RAILBUS_EXTRA": "1"},
    )
    try:
        return up(Path(arguments[0]), options=options, ready_timeout_s=float(wishes.get("ready_s", "15")))
    except RailbusError as exc:
        print(f"{exc.code}: {exc}", flush=True)
        return 2


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
