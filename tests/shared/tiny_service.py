"""A service as small as one can be: it answers one request, and does what its environment says. Run by the tests."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping

from pydantic_settings import SettingsConfigDict

from railbus_shared import service
from railbus_shared.bus.connection import Outgoing
from railbus_shared.bus.endpoints import Endpoint
from railbus_shared.contracts.model import Contract
from railbus_shared.contracts.requests import JobRef
from railbus_shared.errors import ConfigError
from railbus_shared.service import Context, Description, run
from railbus_shared.settings import CommonSettings, HttpSettings, load

logger = logging.getLogger(__name__)


class Settings(HttpSettings):
    """Of the tiny service."""

    model_config = SettingsConfigDict(env_prefix="RAILBUS_TINY_", frozen=True, extra="ignore")


class Tiny:
    """Drains for a moment, then writes a message; its environment makes it do otherwise."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def endpoints(self) -> list[Endpoint[Contract]]:
        endpoint = Endpoint("wait", "railbus.req.tiny.wait", JobRef, self.wait)
        return [endpoint]  # type: ignore[list-item]

    async def wait(self, request: JobRef) -> Contract:
        logger.info("asked")
        await self._context.stopping.wait()
        await asyncio.sleep(0.2)
        return request

    async def run(self) -> None:
        if "TINY_BUG" in os.environ:
            raise ZeroDivisionError("bug")
        if "TINY_CONFIG" in os.environ:
            raise ConfigError("a setting must change")
        if "TINY_CLOSE" in os.environ:
            await self._context.bus.client._send_command(b"NONSENSE\r\n")  # the server says why it closes, and closes
            await self._context.bus.client._flush_pending()
        await self._context.stopping.wait()
        if "TINY_HANG" in os.environ:
            await asyncio.Event().wait()
        if "TINY_QUIET" in os.environ:
            return
        await asyncio.sleep(0.3)
        await self._context.bus.publish(Outgoing("railbus.evt.tiny.x.drained", b"\x80", ""))

    async def checks(self) -> Mapping[str, str]:
        return {"tiny": ""}


if __name__ == "__main__":
    service._SLACK_S = service._FLUSH_S = 1.0  # type: ignore[misc] # instead of five seconds each, for what never comes
    sys.exit(run(Description("tiny", "For tests."), Tiny, common=load(CommonSettings), http=load(Settings)))
