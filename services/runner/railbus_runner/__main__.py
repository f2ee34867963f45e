"""Run the runner: `python -m railbus_runner`."""

from __future__ import annotations

import sys
from functools import partial

from railbus_runner.service import DESCRIPTION, RunnerService
from railbus_runner.settings import Settings
from railbus_runner.user import opened
from railbus_shared.service import run, with_status
from railbus_shared.settings import CommonSettings, load


def main() -> int:
    return with_status(_main, name=DESCRIPTION.name)


def _main() -> int:
    settings = load(Settings)
    access = partial(opened, user=settings.user, groups=settings.user_groups)
    common = load(CommonSettings)
    return run(
        DESCRIPTION, lambda context: RunnerService(context, settings), common=common, http=settings, access=access
    )


if __name__ == "__main__":
    sys.exit(main())
