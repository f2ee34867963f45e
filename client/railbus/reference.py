"""The reference pages of the docs, made from the code: settings, errors, messages, metrics.

`python -m railbus.reference docs` writes them.

A test fails when the pages and the code differ.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic_settings import BaseSettings

from railbus import asyncapi, metrics_page
from railbus.job_states import with_states
from railbus_shared.catalogue import EVENTS, Told
from railbus_shared.contracts import artifacts, checks, devices, events, jobs, logs, requests, saving, waiting
from railbus_shared.contracts.model import Contract
from railbus_shared.errors import RailbusError, known_codes
from railbus_shared.field_docs import field_docs
from railbus_shared.settings import CommonSettings

_SERVICES: Final = ("device_manager", "dataloader", "runner", "telemetry")
_NOTE: Final = "<!-- Made by `make docs` from the code; do not edit. -->\n"


def settings_page() -> str:
    """Every setting of every process: variable, type, default, meaning."""
    parts = [
        _NOTE,
        "# Settings\n",
        "From the environment. A value that cannot be used ends the process with status 2 and names the variable.\n",
    ]
    groups: list[tuple[str, type[BaseSettings]]] = [("Every process", CommonSettings)]
    groups += [(name, importlib.import_module(f"railbus_{name}.settings").Settings) for name in _SERVICES]
    for title, settings in groups:
        parts.append(f"## {title}\n")
        parts.append("| variable | type | default | meaning |\n| --- | --- | --- | --- |")
        parts += list(_setting_rows(settings))
        parts.append("")
    return "\n".join(parts)


def _setting_rows(settings: type[BaseSettings]) -> Iterator[str]:
    prefix = settings.model_config.get("env_prefix", "")
    for name, field in settings.model_fields.items():
        default = "this host's name" if name == "host" else _plain(field.get_default(call_default_factory=True))
        meaning = _one_line(field.description or _inherited(settings, name))
        yield f"| `{prefix}{name}`".upper() + f"` | {_type(field.annotation)} | {default} | {meaning} |".removeprefix(
            "`"
        )


def _inherited(settings: type[BaseSettings], name: str) -> str:
    """The meaning that a base class gives to a field that a service only sets another default of."""
    for base in settings.__mro__[1:]:
        fields = getattr(base, "model_fields", {})
        if name in fields and fields[name].description:
            return str(fields[name].description)
    return ""


def errors_page() -> str:
    """Every error code: branch, status, meaning."""
    parts = [
        _NOTE,
        "# Errors\n",
        "An error has a stable `code`, a `message` that names field and value, a `hint` that says what to do, and\n"
        "`details` for programs. The same code stands in the reply's body; the header `Nats-Service-Error-Code`\n"
        "gives the status. The event of what was refused holds it too.\n",
        "| code | branch | status | meaning |\n| --- | --- | --- | --- |",
    ]
    for code, error in sorted(known_codes().items()):
        if error.__module__ == RailbusError.__module__:
            branch = error.__mro__[-5].__name__
            parts.append(f"| `{code}` | {branch} | {error.status} | {_one_line(error.__doc__ or '')} |")
    return "\n".join([*parts, ""])


def messages_page() -> str:
    """Every contract: fields, types, defaults, meanings."""
    parts = [
        _NOTE,
        "# Messages and files\n",
        "Payloads are msgpack or JSON maps, at most 512 KiB. Unknown fields are refused. A field without a default is "
        "required.\n",
    ]
    for title, module in (
        ("Jobs", jobs),
        ("Devices", devices),
        ("Checks of devices", checks),
        ("Events", events),
        ("Requests", requests),
        ("Logs", logs),
        ("Waiting", waiting),
        ("Checkpoints on request", saving),
        ("Files", artifacts),
    ):
        parts.append(f"## {title}\n")
        parts += _event_rows() if module is events else []
        for contract in _contracts_of(module):
            parts += [f"### {contract.__name__}\n", _one_line(contract.__doc__ or ""), ""]
            if contract.model_fields:
                parts += ["| field | type | default | meaning |\n| --- | --- | --- | --- |", *_field_rows(contract), ""]
    return "\n".join(parts)


def _event_rows() -> list[str]:
    """The types of events, each with what it means."""
    rows = [f"| `{told.type}` | {told.told_by} | {told.meaning} | {_names(told)} |" for told in EVENTS]
    return [
        "Subjects are `railbus.evt.<area>.<id>.<what>`, for instance `railbus.evt.job.j-77732b-1.placed`. A user's own "
        "events are `app.<what>`; behind the subject of what a person tells NATS writes `.<person>`. All of this, and "
        "the requests, stand in [asyncapi.json](asyncapi.json) as well.\n",
        "| type | told by | meaning | data |\n| --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _names(told: Told) -> str:
    return "" if told.data is None else ", ".join(f"`{name}`" for name in told.data)


def _contracts_of(module: object) -> list[type[Contract]]:
    name = module.__name__  # type: ignore[attr-defined]  # it is a module
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Contract)]
    return [contract for contract in found if contract.__module__ == name]


def _field_rows(contract: type[BaseModel]) -> Iterator[str]:
    meanings = field_docs(contract)
    for name, field in contract.model_fields.items():
        default = "" if field.is_required() else _plain(field.get_default(call_default_factory=True))
        yield f"| `{name}` | {_type(field.annotation)} | {default} | {_one_line(meanings.get(name, ''))} |"


def _type(annotation: Any) -> str:
    text = (
        annotation.__name__
        if isinstance(annotation, type) and not getattr(annotation, "__args__", None)
        else str(annotation)
    )
    for noise in (
        "typing.",
        "railbus_shared.contracts.",
        "jobs.",
        "devices.",
        "events.",
        "requests.",
        "artifacts.",
        "pathlib.",
    ):
        text = text.replace(noise, "")
    return "`" + _without_annotated(text).replace("|", "\\|") + "`"


def _without_annotated(text: str) -> str:
    """`Annotated[str, …]` as `str`: the checks are in the message of the error."""
    while (start := text.find("Annotated[")) >= 0:
        depth, end, comma = 0, start + len("Annotated["), -1
        while depth >= 0:
            if text[end] in "[(":
                depth += 1
            elif text[end] in "])":
                depth -= 1
            elif text[end] == "," and depth == 0 and comma < 0:
                comma = end
            end += 1
        text = text[:start] + text[start + len("Annotated[") : comma if comma > 0 else end - 1] + text[end:]
    return text


def _plain(value: object) -> str:
    if isinstance(value, BaseModel):
        return "its defaults"
    shown = repr(str(value) if isinstance(value, Path) else value)
    return f"`{shown}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES: Final = {
    "settings.md": settings_page,
    "errors.md": errors_page,
    "messages.md": messages_page,
    "metrics.md": lambda: _NOTE + "\n" + metrics_page.page(),
    "asyncapi.json": asyncapi.page,
}


PARTS: Final = {"jobs.md": with_states}
"""Pages that a person writes, but for a part between two marks."""


def main(folder: Path) -> int:
    for name, page in PAGES.items():
        (folder / name).write_text(page())
    for name, part in PARTS.items():
        (folder / name).write_text(part((folder / name).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
