"""Settings of the telemetry service, from `RAILBUS_TELEMETRY_*`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from railbus_shared.settings import HttpSettings


class Settings(HttpSettings):
    """What an operator may change."""

    model_config = SettingsConfigDict(**{**HttpSettings.model_config, "env_prefix": "RAILBUS_TELEMETRY_"})

    http_port: int = Field(default=8704, ge=0, le=65_535)
    """0 takes any free port."""
    rotation: Literal["hourly", "daily"] = "hourly"
    """How long a period of the log lasts; a closed one joins its day's gzip file."""
    batch: int = Field(default=256, ge=1, le=4096)
    """Messages taken from the stream at once; each write and flush to disk serves so many."""
