"""Prometheus metrics that every service has; a service adds its own to the same registry."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True)
class Metrics:
    """Metrics of one process, in a registry of their own so that tests can run several."""

    service: str
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter = field(init=False)
    request_seconds: Histogram = field(init=False)
    rejected: Counter = field(init=False)
    events: Counter = field(init=False)
    events_dropped: Counter = field(init=False)
    reconnects: Counter = field(init=False)
    connected: Gauge = field(init=False)

    def __post_init__(self) -> None:
        add = object.__setattr__
        add(self, "requests", self.counter("rpc_requests", "Requests served.", "endpoint", "code"))
        add(self, "request_seconds", self.histogram("rpc_duration_seconds", "Time to serve a request.", "endpoint"))
        add(self, "rejected", self.counter("rejected_messages", "Messages refused, by error code.", "code"))
        add(self, "events", self.counter("events_published", "Events acknowledged by the bus.", "type"))
        add(self, "events_dropped", self.counter("events_dropped", "Events given up.", "type", "severity"))
        add(self, "reconnects", self.counter("nats_reconnects", "Times the connection to NATS came back."))
        add(self, "connected", self.gauge("nats_connected", "Whether NATS is connected."))
        build = self.gauge("build_info", "Always 1; the labels tell the build.", "service", "version")
        build.labels(self.service, version()).set(1)

    def counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"railbus_{name}", help_text, labels, registry=self.registry)

    def gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"railbus_{name}", help_text, labels, registry=self.registry)

    def histogram(self, name: str, help_text: str, *labels: str) -> Histogram:
        return Histogram(f"railbus_{name}", help_text, labels, registry=self.registry, buckets=_SECONDS)


def version() -> str:
    """Of the installed package."""
    from importlib.metadata import version as installed  # noqa: PLC0415 - costs 20 ms, and few callers need it

    return installed("railbus")
