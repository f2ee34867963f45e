"""Settings of the dataloader, from `RAILBUS_DATALOADER_*`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from railbus_shared.settings import HttpSettings


class Settings(HttpSettings):
    """What an operator may change."""

    model_config = SettingsConfigDict(**{**HttpSettings.model_config, "env_prefix": "RAILBUS_DATALOADER_"})

    http_port: int = Field(default=8702, ge=0, le=65_535)
    """0 takes any free port."""
    scan_s: float = Field(default=30.0, gt=0)
    """Between two looks at the datasets under the root; a question about one looks at once."""
    session_ttl_s: float = Field(default=30.0, gt=0, le=3600)
    """A stream that is not heard of for so long counts as closed; runners speak three times as often."""
    cache_bytes: int = Field(default=0, ge=0)
    """Most bytes of shards that were fetched from elsewhere; 0 is half of what is free on the disk at the start."""
    ahead_bytes: int = Field(default=0, ge=0)
    """Most bytes made ready ahead of all trainers together; 0 is half of the memory that is available."""
