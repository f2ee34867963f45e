"""Where the NATS is that is backed up or restored, and the key for it.

Only the operator's key may copy streams and put them back. It lies among the keys of a root or of a deployment, which
belong to whoever runs the server, and is given to nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from railbus.embedded.members import Place, ensure_members
from railbus.embedded.nats_server import NatsServer, find_server
from railbus.embedded.permissions import OPERATOR
from railbus.embedded.run_files import RunPaths, acquire, read_bus
from railbus.embedded.server_config import ServerFiles, render
from railbus_shared.errors import AlreadyRunning, BusUnavailable, NotAuthorized
from railbus_shared.settings import CommonSettings, load


@dataclass(frozen=True)
class Reached:
    """A NATS, and how to join it."""

    settings: CommonSettings
    is_own: bool = False
    """Whether it is that of a root, started for this command."""


def named(root: Path, deployment: Path | None) -> Reached | None:
    """The NATS of a deployment, or the one that the environment names; None for that of the root.

    Raises NotAuthorized if the deployment has no key of the operator, BadSetting.
    """
    settings = load(CommonSettings).model_copy(update={"root": root})
    if deployment is None:
        return Reached(settings) if "nats_url" in settings.model_fields_set else None
    found: dict[str, object] = {"nats_key_file": _key_of(Place.of_deployment(deployment))}
    authority = deployment / "tls" / "ca.crt"
    if authority.exists() and settings.nats_ca_file is None:
        found["nats_ca_file"] = authority
    if authority.exists() and "nats_url" not in settings.model_fields_set:
        found["nats_url"] = "tls://localhost:4222"
    return Reached(settings.model_copy(update=found))


def running(root: Path) -> Reached:
    """The NATS of the `railbus up` that runs on a root; raises BusUnavailable, NotAuthorized."""
    bus = read_bus(root)
    if bus is None:
        raise BusUnavailable(
            f"nothing runs on {str(root)!r}", hint="`railbus up`, or name a NATS by --deployment or RAILBUS_NATS_URL"
        )
    found = {"root": root, "nats_url": bus.url, "nats_key_file": _key_of(Place.of_root(root))}
    return Reached(load(CommonSettings).model_copy(update=found))


@contextmanager
def own_server(root: Path) -> Iterator[Reached]:
    """The NATS of a root without the services, for as long as it is needed.

    Raises AlreadyRunning if `railbus up` runs there, ServerNotFound, BusUnavailable, ConfigError.
    """
    paths, settings = RunPaths(root.absolute()), load(CommonSettings)
    if read_bus(root) is not None:
        raise AlreadyRunning(f"`railbus up` runs on {str(root)!r}", hint="stop it first")
    paths.make()
    lock = acquire(paths)
    try:
        where, place = ServerFiles(paths.nats), Place.of_root(paths.root)
        keys, granted = ensure_members(place, settings.subject_prefix)

        def configuration(port: int) -> bytes:
            return render(where, port=port, name="railbus", keys=keys, policy=granted)

        server = NatsServer(find_server(), where=where, render=configuration, port=0)
        server.start()
        try:
            found = {"root": root, "nats_url": server.url, "nats_key_file": place.seed(OPERATOR), "replicas": 1}
            yield Reached(settings.model_copy(update=found), is_own=True)
        finally:
            server.stop()
    finally:
        lock.close()


def _key_of(place: Place) -> Path:
    key = place.seed(OPERATOR)
    if not key.exists():
        raise NotAuthorized(
            f"there is no key of the operator: {str(key)!r}",
            hint="`railbus init` makes it, or a restart of `railbus up`; NATS must be told by a reload",
        )
    return key
