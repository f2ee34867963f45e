"""Run the dataloader: `python -m railbus_dataloader`."""

from __future__ import annotations

import sys

from railbus_dataloader.service import DESCRIPTION, DataloaderService
from railbus_dataloader.settings import Settings
from railbus_shared.service import run, with_status
from railbus_shared.settings import CommonSettings, load


def main() -> int:
    return with_status(_main, name=DESCRIPTION.name)


def _main() -> int:
    settings = load(Settings)
    return run(
        DESCRIPTION, lambda context: DataloaderService(context, settings), common=load(CommonSettings), http=settings
    )


if __name__ == "__main__":
    sys.exit(main())
