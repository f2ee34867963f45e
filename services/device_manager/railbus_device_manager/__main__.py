"""Run the device_manager: `python -m railbus_device_manager`."""

from __future__ import annotations

import sys

from railbus_device_manager.service import DESCRIPTION, DeviceManagerService
from railbus_device_manager.settings import Settings
from railbus_shared.service import run, with_status
from railbus_shared.settings import CommonSettings, load


def main() -> int:
    return with_status(_main, name=DESCRIPTION.name)


def _main() -> int:
    settings = load(Settings)
    return run(
        DESCRIPTION, lambda context: DeviceManagerService(context, settings), common=load(CommonSettings), http=settings
    )


if __name__ == "__main__":
    sys.exit(main())
