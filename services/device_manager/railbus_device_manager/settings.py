"""Settings of the device_manager, from `RAILBUS_DEVICE_MANAGER_*`."""

from __future__ import annotations

from typing import Annotated

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
    quotas: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Most devices that an owner's jobs hold at once, as a JSON map; `*` stands for every owner that is not named."""
    fair_share_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Shares of owners within one priority, relative to each other, as a JSON map; 1 for an owner that is not named."""
    fair_share_half_life_s: float = Field(default=3600.0, gt=0)
    """After so many seconds what an owner's jobs used counts half; what they hold now always counts."""
    preempt: bool = True
    """Whether running jobs make room, after a checkpoint, for one of higher priority that could not start otherwise."""
    preempt_after_s: float = Field(default=15.0, ge=0)
    """How long such a job waits before that, in seconds: devices may become free by themselves."""
    place_s: float = Field(default=1.0, gt=0, le=60)
    """Longest time between two looks at the queue; news of jobs and devices are acted on at once."""
    gpu_shares: int = Field(default=1, ge=1, le=8)
    """Into how many shares of its memory each GPU of this host is divided, for jobs that ask for a fraction of one."""
    tolerate_strangers: bool = False
    """Grant a GPU although processes compute on it that are not of railbus, such as those of a desktop or of MPS."""
