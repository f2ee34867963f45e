"""Settings of the telemetry service, from `RAILBUS_TELEMETRY_*`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from railbus_shared.settings import HttpSettings


class Settings(HttpSettings):
    """What an operator may change."""

    model_config = SettingsConfigDict(**{**HttpSettings.model_config, "env_prefix": "RAILBUS_TELEMETRY_"})

    http_port: int = Field(default=8704, ge=0, le=65_535)
    """0 takes any free port."""
    rotation: Literal["hourly", "daily"] = "hourly"
    """How long a period of the log lasts; a closed one joins its day's gzip file."""
    keep_days: int | None = Field(default=None, ge=1, le=36_500)
    """Days for which a day's log is kept after it, then its folder goes; all are kept if it is not set: what nobody
    asked to have deleted stays, and a million events take less than 100 MB."""
    keep_bytes: int | None = Field(default=None, ge=1_000_000)
    """Bytes that the logs tree may have; beyond it the oldest days go, but never the current day or one that is still
    written to. No limit if it is not set."""
    batch: int = Field(default=256, ge=1, le=4096)
    """Messages taken from the stream at once; each write and flush to disk serves so many."""
    otlp_endpoint: str = Field(default="", pattern=r"^(https?://.*)?$")
    """An OpenTelemetry collector (OTLP over HTTP, for instance `http://127.0.0.1:4318`) that gets the trace of each job
    when it has ended; none if empty."""
    otlp_headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Headers for it, such as an authorization, as a JSON map."""
