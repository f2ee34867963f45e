"""Training code that is after the key of its runner, and what it may find."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nkeys

CODE = '''
"""Looks for the runner's key wherever a process of the same user could."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
SEIZE, READV, GETFD = 0x4206, 310, 438
PLANTED = bytearray(b"SU" + bytes(65 + byte % 26 for byte in os.urandom(56)))


def tried(steal):
    """What came of it: the name of the error's number, or what was stolen."""
    try:
        return repr(steal())
    except OSError as exc:
        return errno.errorcode[exc.errno]


def called(number, *arguments):
    if LIBC.syscall(number, *map(ctypes.c_long, arguments)) < 0:
        raise OSError(ctypes.get_errno(), "")
    return "done"


def trace(pid):
    if LIBC.ptrace(SEIZE, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "")
    return "traced"


def read_memory(pid):
    """A page by process_vm_readv; the address need not be one, since who may not read is told that first."""
    buffer = ctypes.create_string_buffer(8)
    mine, theirs = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8), (ctypes.c_size_t * 2)(4096, 8)
    return called(READV, pid, ctypes.addressof(mine), 1, ctypes.addressof(theirs), 1, 0)


def take_descriptor(pid):
    return called(GETFD, os.pidfd_open(pid), 0, 0)


def looks(pid):
    """What came of each look into a process."""
    return {
        **{name: tried(lambda: first_byte(f"/proc/{pid}/{name}")) for name in ("mem", "environ", "maps", "auxv")},
        **{name: tried(lambda: os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "cwd", "root")},
        "vm_readv": tried(lambda: read_memory(pid)),
        "pidfd_getfd": tried(lambda: take_descriptor(pid)),
        "ptrace": tried(lambda: trace(pid)),
    }


def first_byte(path):
    with open(path, "rb") as file:
        return file.read(1)


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def seeds_in_memory(prefixes):
    """SHA-256 of all in this process's memory that could be a seed, as text or as its bytes."""
    pattern = re.compile(b"SU[A-Z2-7]{56}|" + b"|".join(re.escape(prefix) + b".{28}" for prefix in prefixes), re.DOTALL)
    found, size = set(), 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            bounds, rights = line.split()[:2]
            start, end = (int(each, 16) for each in bounds.split("-"))
            with contextlib.suppress(OSError, ValueError, OverflowError):  # such as [vvar]
                if rights[0] == "r":
                    memory.seek(start)
                    data = memory.read(end - start)
                    size += len(data)
                    found |= {hashlib.sha256(each).hexdigest() for each in pattern.findall(data)}
    return found, size


def steal(ctx):
    warm = os.getppid()
    runner, key = parent(warm), ctx.params["key"]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found, size = seeds_in_memory([bytes.fromhex(each) for each in ctx.params["prefixes"]])
    loot = {
        **looks(runner),
        "is_runner": b"railbus_runner" in Path(f"/proc/{runner}/cmdline").read_bytes(),
        "uids": status["Uid"].split(),
        "capabilities": int(status["CapPrm"], 16) | int(status["CapEff"], 16) | int(status["CapInh"], 16),
        "key": tried(lambda: Path(key).read_bytes()),
        "by_runner": tried(lambda: Path(f"/proc/{runner}/root{key}").read_bytes()),
        "setuid": tried(lambda: os.setuid(0)),
        "own": sorted({os.readlink(f"/proc/{pid}/fd/{fd}") for pid in ("self", warm) for fd in descriptors(pid)}),
        "variables": [name for pid in ("self", warm) for name in variables(pid) if "RAILBUS" in name or "NATS" in name],
        "scanned_bytes": size,
        "planted": hashlib.sha256(PLANTED).hexdigest() in found,
        "seeds": sorted(found),
    }
    Path(ctx.params["loot"]).write_text(json.dumps(loot))


def descriptors(pid):
    return [fd for fd in os.listdir(f"/proc/{pid}/fd") if os.path.lexists(f"/proc/{pid}/fd/{fd}")]


def variables(pid):
    return Path(f"/proc/{pid}/environ").read_text(errors="replace").split(chr(0))
'''

DENIED = {"EACCES", "EPERM", "ENOSYS"}
"""The last by engines of containers, for calls that they do not know."""
LOOKS = ("mem", "environ", "maps", "auxv", "fd", "cwd", "root", "vm_readv", "pidfd_getfd", "ptrace")
"""Into a process; what `looks` tells of each."""
WAYS = ("key", "by_runner", *LOOKS, "setuid")
"""To the key, or to the power to read it."""


def params(key: Path, seed: str, loot: Path) -> dict[str, Any]:
    """Of a job whose code looks for the key; its own words for the bytes of the seed do not hold them."""
    return {"key": str(key), "loot": str(loot), "prefixes": [_raw(seed)[:4].hex()]}


def digests(seed: str) -> set[str]:
    """Of the seed, as it would be found in memory."""
    return {hashlib.sha256(form).hexdigest() for form in (seed.encode(), _raw(seed))}


def _raw(seed: str) -> bytes:
    _, raw = nkeys.decode_seed(seed.encode())
    return bytes(raw)


def has_stolen(loot: dict[str, Any], seed: str) -> dict[str, Any]:
    """Whatever came out otherwise than it should; empty where nothing was to be had."""
    wrong = {name: loot[name] for name in WAYS if loot[name] not in DENIED}
    wrong |= {name: loot[name] for name in ("variables", "capabilities") if loot[name]}
    if any(path.endswith(".nk") for path in loot["own"]):
        wrong["own"] = loot["own"]
    if not (loot["is_runner"] and loot["planted"] and loot["scanned_bytes"] > 50 << 20):
        wrong["look"] = "it has not looked where it should"
    if digests(seed) & set(loot["seeds"]):
        wrong["memory"] = "the seed is in it"
    return wrong


def launcher(*needed: Path) -> tuple[str, ...]:
    """Words before a command that let any user reach what lies below folders that are closed to others.

    As a copy of the machine's own mounts with such folders emptied, but for what is `needed`.
    """
    closed = sorted({above for path in needed for above in path.parents if not above.stat().st_mode & 0o001})
    if not closed:
        return ()
    lines = ["set -e", "hold=$(mktemp -d)", "mount -t tmpfs -o mode=755 none $hold"]
    for number, path in enumerate(needed):
        lines += [f"mkdir $hold/{number}", f"mount --bind {shlex.quote(str(path))} $hold/{number}"]
    for above in closed:
        lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(above))}"]
    for number, path in enumerate(needed):
        if any(above in path.parents for above in closed):
            lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --bind $hold/{number} {shlex.quote(str(path))}"]
    return ("unshare", "--mount", "--propagation", "private", "bash", "-c", "\n".join([*lines, 'exec "$@"']), "bash")


def as_user(uid: int) -> tuple[str, ...]:
    """Words before a command that has that user's rights."""
    return ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--")


def can_import(start: tuple[str, ...], uid: int) -> bool:
    """Whether that user can run our code."""
    command = [*start, *as_user(uid), sys.executable, "-P", "-c", "import railbus_runner, torch"]
    return subprocess.run(command, capture_output=True, env={"PATH": os.environ["PATH"]}, check=False).returncode == 0
