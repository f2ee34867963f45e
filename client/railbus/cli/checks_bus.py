"""What `railbus doctor` looks at on the bus, and at the services that should run."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Final

from railbus.cli.checks import Finding
from railbus_shared.errors import BusUnavailable, NotAuthorized, RailbusError

if TYPE_CHECKING:
    from railbus_shared.layout import Layout
    from railbus_shared.settings import CommonSettings

_SERVICES: Final = ("device_manager", "dataloader", "runner", "telemetry")
_HTTP_S: Final = 5.0
_CONNECT_S: Final = 2.0


async def bus_findings(layout: Layout, root: Path | None) -> list[Finding]:
    """NATS, JetStream and credentials; and where a `railbus up` runs on the root, its services."""
    from railbus.client import settings_for
    from railbus.embedded.run_files import read_bus

    try:
        settings = settings_for(root)
        is_up = read_bus(layout.root) is not None
    except RailbusError as exc:
        return [Finding("settings", "fail", exc.message, exc.hint)]
    if not is_up and "nats_url" not in settings.model_fields_set:
        return [Finding("nats", "warn", f"nothing runs on {layout.root.absolute()}", "railbus up")]
    findings = [await _nats(settings)]
    if is_up:
        findings += await asyncio.gather(*(asyncio.to_thread(_service, layout, name) for name in _SERVICES))
    return findings


async def _nats(settings: CommonSettings) -> Finding:
    from railbus_shared.bus.connection import Bus

    url = settings.nats_url
    try:
        async with Bus.open(settings.model_copy(update={"connect_timeout_s": _CONNECT_S}), name="doctor") as bus:
            await bus.check_jetstream()
    except NotAuthorized as exc:
        return Finding("nats", "fail", exc.message, exc.hint)
    except BusUnavailable as exc:
        return Finding("nats", "fail", exc.message, "railbus up, or set RAILBUS_NATS_URL")
    except RailbusError as exc:
        return Finding("nats", "fail", f"{url}: {exc.message}", "start the server with JetStream")
    return Finding("nats", "ok", f"{url}, JetStream answers, the key is good")


def _service(layout: Layout, name: str) -> Finding:
    """By the HTTP address that the service has left in its run file."""
    run = layout.state / "run"
    log = run / f"{name}.log"
    try:
        url = str(json.loads((run / f"{name}.json").read_bytes())["http_url"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return Finding(name, "fail", "it does not serve HTTP", f"look at {log}")
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=_HTTP_S):  # noqa: S310 - the URL is loopback, from our file
            return Finding(name, "ok", f"ready at {url}")
    except urllib.error.HTTPError as exc:
        said = exc.read(2000).decode(errors="replace").strip().splitlines()
        exc.close()
        return Finding(name, "fail", f"not ready: {'; '.join(said[:3])}", f"look at {log}")
    except OSError as exc:
        return Finding(name, "fail", f"{url} does not answer: {exc}", f"look at {log}")
