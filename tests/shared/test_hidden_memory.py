"""What a process of the same user sees of one that hides its memory, and of one that does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thief import CODE, DENIED, LOOKS, as_user, launcher

UID = 23_456
REPOSITORY = Path(__file__).parents[2]

HOLDER = """
import sys
sys.path[:0] = sys.argv[2:]
from railbus_shared.hidden_memory import hide_memory
if sys.argv[1] == "hides":
    hide_memory()
print("holds", flush=True)
sys.stdin.read()
"""
LOOKER = f"""{CODE}
import sys
json.dump(looks(int(sys.argv[1])), sys.stdout)
"""


@pytest.mark.root
@pytest.mark.parametrize("how", ["hides", "shows"])
def test_who_has_the_same_user_sees_only_what_is_not_hidden(how: str) -> None:
    start = (*launcher(Path(sys.base_prefix), Path(sys.prefix), REPOSITORY), *as_user(UID))
    holder = [*start, sys.executable, "-P", "-c", HOLDER, how, *sys.path]
    pipe = subprocess.PIPE
    with subprocess.Popen(holder, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        looker = [*start, sys.executable, "-P", "-c", LOOKER, str(process.pid)]
        found = subprocess.run(looker, capture_output=True, text=True, check=True)
        process.communicate("")
    denied = {way for way, outcome in json.loads(found.stdout).items() if outcome in DENIED}
    assert set(LOOKS) - denied == (set() if how == "hides" else set(LOOKS) - _denied_by_yama()), found.stdout


def _denied_by_yama() -> set[str]:
    """What many systems allow to a parent only, whatever is hidden."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return {"mem", "vm_readv", "pidfd_getfd", "ptrace"} if scope.exists() and int(scope.read_text()) else set()
