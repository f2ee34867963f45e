"""Settings of the device_manager, from `RAILBUS_DEVICE_MANAGER_*`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from railbus_shared.settings import HttpSettings


class Settings(HttpSettings):
    """What an operator may change."""

    model_config = SettingsConfigDict(**{**HttpSettings.model_config, "env_prefix": "RAILBUS_DEVICE_MANAGER_"})

    http_port: int = Field(default=8701, ge=0, le=65_535)
    """0 takes any free port."""
    cpu_slots: int | None = Field(default=None, ge=0)
    """CPU slots of this host; by default one for each NUMA node, 0 for none."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of this host's devices, as a JSON map; a job may ask for them."""
    place_s: float = Field(default=1.0, gt=0, le=60)
    """Longest time between two looks at the queue; news of jobs and devices are acted on at once."""
    gpu_shares: int = Field(default=1, ge=1, le=8)
    """Into how many shares of its memory each GPU of this host is divided, for jobs that ask for a fraction of one."""
