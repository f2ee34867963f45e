"""Settings of the runner, from `RAILBUS_RUNNER_*`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from railbus_shared.contracts.jobs import LogRule
from railbus_shared.settings import HttpSettings


class Settings(HttpSettings):
    """What an operator may change."""

    model_config = SettingsConfigDict(**{**HttpSettings.model_config, "env_prefix": "RAILBUS_RUNNER_"})

    http_port: int = Field(default=8703, ge=0, le=65_535)
    """0 takes any free port."""
    grace_s: float = Field(default=15.0, ge=0, le=3600)
    """Time for trainers to write a checkpoint after SIGTERM, before they are killed."""
    entrypoint_dirs: tuple[Path, ...] = ()
    """Folders whose `package.module:function` jobs may name, as a JSON list; none by default."""
    workdirs: tuple[Path, ...] = ()
    """Folders in which a job's `workdir` may lie, as a JSON list; none by default: trainers work in fresh ones."""
    may_gain_privileges: bool = False
    """Lets what trainers start gain rights (`sudo`, a set-uid `nvidia-modprobe`), which `no_new_privs` forbids them."""
    user: str = ""
    """Of a runner that root starts: whom it becomes, for good, once it has read its key, as a name, a number or either
    with `:` and a group. Training code then has the rights of that user, who cannot read the key. None by default."""
    user_groups: tuple[str, ...] = ()
    """Groups of that user beside those that the system knows, such as `render` for devices: names, as a JSON list."""
    log_rules: tuple[LogRule, ...] = ()
    """What lines of a failed attempt's output tell, before the runner's own rules: a JSON list of `LogRule`."""
    reap_s: float = Field(default=10.0, gt=0)
    """Longest wait for the processes of an attempt to be gone after they were killed."""
