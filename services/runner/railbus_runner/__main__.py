"""Run the runner: `python -m railbus_runner`."""

from __future__ import annotations

import sys

from railbus_runner.service import DESCRIPTION, RunnerService
from railbus_runner.settings import Settings
from railbus_shared.service import run
from railbus_shared.settings import CommonSettings, load


def main() -> int:
    settings = load(Settings)
    return run(
        DESCRIPTION, lambda context: RunnerService(context, settings), common=load(CommonSettings), http=settings
    )


if __name__ == "__main__":
    sys.exit(main())
