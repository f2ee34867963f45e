"""`railbus doctor`: is this machine fit, does what should run do so, and how to mend what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from railbus.cli import exit_codes
from railbus.cli.render import STATE_STYLES, print_json, to_console
from railbus.cli.session import json_option, root_option, run, session

if TYPE_CHECKING:
    from rich.console import Console

    from railbus.cli.checks import Finding


@click.command()
@json_option
@root_option
def doctor(*, as_json: bool) -> int:
    """Check this machine, and say how to mend what is wrong.

    Exits with 0 unless something fails; a warning is nothing that stops railbus.
    """
    from railbus.cli.checks import machine_findings
    from railbus.cli.checks_bus import bus_findings

    layout, root_given = session().layout, session().root
    findings = [*machine_findings(layout), *run(bus_findings(layout, root_given))]
    is_fit = all(finding.status != "fail" for finding in findings)
    if as_json:
        print_json({"ok": is_fit, "checks": [asdict(finding) for finding in findings]})
    else:
        _show(findings, console=to_console())
        click.echo(_verdict(findings), err=True)
    return exit_codes.OK if is_fit else exit_codes.FAILURE


def _show(findings: Sequence[Finding], *, console: Console) -> None:
    from rich.text import Text

    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        style = STATE_STYLES[finding.status]
        console.print(Text.assemble((f"{finding.status:<4}", style), f"  {finding.name:<{width}}  {finding.detail}"))
        if finding.fix:
            console.print(Text.assemble(" " * (width + 8), ("fix: ", "bold"), finding.fix))


def _verdict(findings: Sequence[Finding]) -> str:
    counts = {status: sum(finding.status == status for finding in findings) for status in ("fail", "warn")}
    if not any(counts.values()):
        return "all well"
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)
