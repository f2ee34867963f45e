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
    origins: tuple[str, ...] = ()
    """Object storage with datasets that neither lie here nor on another host, as a JSON list of URLs, for instance
    `["s3://bucket/prefix"]`; also `gs://` and `file://`. Credentials come from the standard environment."""
    window_bytes: int = Field(default=16 << 20, ge=1 << 20, le=1 << 26)
    """Bytes that may be under way from another host at once; more does not make it faster."""
    transfers: int = Field(default=4, ge=1, le=64)
    """Files that are sent to other hosts at once; what is beyond waits its turn."""
    stall_s: float = Field(default=10.0, gt=0, le=600)
    """Silence after which another host is given up, and its file asked for again or elsewhere."""
