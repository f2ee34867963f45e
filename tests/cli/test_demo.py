"""`railbus demo` and `railbus up` as a user runs them: everything real, from data to checkpoint."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from commands import environment, railbus, railbus_here
from railbus.cli import demo_report
from railbus.cli.demo_report import Result
from railbus_shared.layout import Layout
from until import PATIENCE_S

_GOOD = Result(
    job="j-4f09ac-1",
    state="succeeded",
    accuracy=0.98,
    checkpoint="checkpoint-000001.pt",
    sha256="0" * 64,
    log="trainer.log.jsonl.gz",
    num_events=10,
    faults=(),
    tree=(),
    root="learning",
    seconds=10.0,
)


@pytest.mark.parametrize(
    ("result", "is_good"),
    [
        (_GOOD, True),
        (replace(_GOOD, accuracy=0.95), False),
        (replace(_GOOD, accuracy=None), False),
        (replace(_GOOD, state="failed"), False),
        (replace(_GOOD, faults=("index.json: $.samples: -1 is less than 1",)), False),
    ],
)
def test_the_demo_is_good_only_if_everything_is(result: Result, is_good: bool) -> None:
    assert result.is_good is is_good


def test_where_no_environment_is_active_the_next_commands_name_the_program_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ".venv" / "bin" / "railbus"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert "  .venv/bin/railbus logs j-4f09ac-1" in "\n".join(demo_report.further(_GOOD))
    monkeypatch.setenv("PATH", str(program.parent))
    assert "  railbus logs j-4f09ac-1" in "\n".join(demo_report.further(_GOOD))


@pytest.mark.timeout(180)  # it trains for real, and on a busy machine that takes its time
def test_the_demo_leaves_a_model_that_is_right_and_a_tree_that_is_whole(tmp_path: Path) -> None:
    done = railbus("demo", "--epochs", "4", "--json", cwd=tmp_path, timeout_s=170)
    assert done.status == 0, done.err
    result = done.json()
    assert isinstance(result, dict)
    assert result["ok"]
    assert result["accuracy"] > 0.95
    for told in ("runner ready", "dataset digits: 1,797 samples", "published job", "first step", "succeeded"):
        assert told in done.err
    assert max(map(len, done.err.splitlines())) < 80  # a terminal adds a symbol to each line
    layout = Layout(tmp_path / "learning")
    closed = sorted(layout.logs.rglob("*"))
    assert [path.name for path in closed if path.is_file() and path.name[0] != "."] == ["trainer.log.jsonl.gz"]
    types = [json.loads(line)["type"] for line in gzip.decompress((tmp_path / result["log"]).read_bytes()).splitlines()]
    assert {"job.queued", "job.placed", "job.started", "job.checkpointed", "job.succeeded"} <= set(types)
    check_checkpoints(tmp_path)
    assert railbus("dataset", "verify", "digits", cwd=tmp_path).status == 0
    assert "succeeded" in railbus("logs", result["job"], cwd=tmp_path).out
    assert not (layout.state / "bus.json").exists()


def check_checkpoints(tree: Path) -> None:
    """They are whole, were trained on what lies here, and can be given to others."""
    assert railbus_here("checkpoints", "verify", cwd=tree).status == 0
    shown = railbus_here("checkpoints", "show", "digits-cnn", "--json", cwd=tree).json()
    assert isinstance(shown, dict)
    links = [(link["what"], link["verdict"]) for link in shown["lineage"]["links"] if link["what"] != "parent"]
    expected = {"dataset": "proven", "schema": "proven", "job": "unknown", "model": "proven", "file": "proven"}
    assert links == list(expected.items())
    assert {link["verdict"] for link in shown["lineage"]["links"] if link["what"] == "parent"} <= {"proven", "unknown"}
    assert railbus_here("checkpoints", "diff", "digits-cnn", cwd=tree).status == 0
    assert railbus_here("checkpoints", "export", "digits-cnn", "--safetensors", "weights", cwd=tree).status == 0
    model = json.loads(Layout(tree / "learning").model_schema("digits-cnn").read_bytes())
    assert load_file(tree / "weights").keys() == model["parameters"].keys()


@pytest.mark.timeout(180)  # the runner imports torch
def test_up_serves_until_ctrl_c_and_leaves_nothing_running(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "railbus.cli.main", "up", "--nats-port", "0", "--http-port-base", "0"],
        cwd=tmp_path,
        env=environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in iter(process.stdout.readline, ""):
            lines.append(line)
            if "pub railbus.jobs.submit" in line:
                break
        assert process.poll() is None, "".join(lines)
        assert railbus("devices", "--json", cwd=tmp_path).status == 0
        again = railbus("up", cwd=tmp_path)
        assert (again.status, "error[ALREADY_RUNNING]" in again.err) == (2, True)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0, process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert railbus("jobs", cwd=tmp_path).status == 5
