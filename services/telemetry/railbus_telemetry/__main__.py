"""Run the telemetry: `python -m railbus_telemetry`."""

from __future__ import annotations

import sys

from railbus_shared.service import run, with_status
from railbus_shared.settings import CommonSettings, load
from railbus_telemetry.service import DESCRIPTION, TelemetryService
from railbus_telemetry.settings import Settings


def main() -> int:
    return with_status(_main, name=DESCRIPTION.name)


def _main() -> int:
    settings = load(Settings)
    return run(
        DESCRIPTION, lambda context: TelemetryService(context, settings), common=load(CommonSettings), http=settings
    )


if __name__ == "__main__":
    sys.exit(main())
