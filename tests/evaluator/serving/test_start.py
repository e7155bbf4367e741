"""An evaluator that can't start gives the operator one line with the reason, and leaves no files behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atserving.errors import StartError
from atserving.local.examples import ROOT
from evaluator.serving.instance import InstanceSettings, run
from tests.evaluator.digits import DIGITS, digits_tar
from tests.evaluator.scripts import wait_for
from tests.processes import Process, Registry, start_evaluator

SCRIPT = b"def net_inference(model, args): ...\ndef net_init(cfg):\n"
TARS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no-weights": ({"weight.caffemodel": None}, "the release's tar has no weight.caffemodel"),
    "script": ({"net.py": b"def net_init(cfg): ..."}, "net.py has no function net_inference"),
    "script-error": ({"net.py": SCRIPT + b"    return {'error': 'no tags'}"}, "no tags"),
    "no-net": ({"deploy.prototxt": b"layer {"}, "the net can't be converted: deploy.prototxt: "),
    "broken-weights": ({"weight.caffemodel": b"\xff" * 99}, "the net can't be converted: weight.caffemodel: "),
    "broken-mean": ({"mean.binaryproto": b"\xff" * 99}, "mean.binaryproto: "),
    "labels-without-names": ({"labels.csv": b"zero\none\n"}, "labels.csv: line 1 is 'zero', should be a class index"),
    "labels-twice": ({"labels.csv": b"0,zero\n0,one\n"}, "labels.csv: line 2 names class 0 again"),
    "labels-in-latin-1": ({"labels.csv": b"0,z\xe9ro\n"}, "labels.csv is not UTF-8 text"),
}
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "gpu": ({"use_device": "GPU"}, "use_device is GPU, but this onnxruntime has no CUDA"),
    "gpu-1": ({"use_device": "GPU:1"}, "use_device is GPU:1, but this onnxruntime has no CUDA"),
    "other-net": ({"custom_values": {"net": "guess"}}, "custom_values.net is 'guess'; the built-in nets are: classify"),
    "odd-net": ({"custom_values": {"net": ["classify"]}}, "custom_values.net is ['classify']"),
    "other-output": ({"custom_values": {"output": "ip1"}}, "the net's outputs are ['prob']"),
    "odd-scale": ({"custom_values": {"raw_scale": "1"}}, "custom_values.raw_scale is '1', should be a finite number"),
    "two-means": ({"custom_values": {"mean_values": [1, 2, 3]}}, "both mean.binaryproto and custom_values.mean_values"),
    "narrow": ({"image_width": 8}, "image_width is 8, less than the net's input, 28"),
    "threads": ({"model_params": {"intra_op_threads": 0}}, "model_params.intra_op_threads is 0, should be a positive"),
    "digest": ({"file": f"file://{DIGITS / 'digits-v1.tar'}#sha256={'0' * 64}"}, f"not {'0' * 64}"),
    "no-file": ({"file": "file:///no/such.tar"}, "there is no such file"),
    "qiniu": (
        {"file": "qiniu://z0/models/digits.tar"},
        "file qiniu://z0/models/digits.tar: needs the keys of its owner, see --qiniu",
    ),
}


async def start_error(registry: str, app: str, workspace: Path, wait_s: float = 5) -> str:
    """Return the message with which an evaluator fails to start, after checks of its form and of the workspace."""
    with pytest.raises(StartError) as error:
        await run(InstanceSettings(app, "v1", [registry], "127.0.0.1:0", workspace=workspace, wait_s=wait_s))
    message = str(error.value)
    assert "\n" not in message
    assert str(workspace) not in message
    assert os.listdir(workspace) == []
    return message


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("app", TARS)
async def test_tar_that_can_not_be_served_fails_to_start(
    app: str, registry: Registry, tmp_path: Path, workspace: Path
) -> None:
    members, message = TARS[app]
    registry.publish(app, file=digits_tar(tmp_path / "release.tar", **members))
    assert message in await start_error(registry.address, app, workspace)


@pytest.mark.parametrize("app", FIELDS)
async def test_release_that_can_not_be_served_fails_to_start(app: str, registry: Registry, workspace: Path) -> None:
    fields, message = FIELDS[app]
    registry.publish(app, **fields)
    assert message in await start_error(registry.address, app, workspace)


async def test_unpublished_or_malformed_release_fails_to_start(registry: Registry, workspace: Path) -> None:
    registry.publish("malformed", use_device="TPU")
    for app in ("malformed", "nobody"):
        message = await start_error(registry.address, app, workspace, 0.2)
        assert message == f"{app} v1 was not published within 0.2 s, or its release is malformed"


async def test_port_in_use_fails_to_start(registry: Registry, workspace: Path) -> None:
    registry.publish("busy")
    settings = InstanceSettings("busy", "v1", [registry.address], registry.address, workspace=workspace)
    with pytest.raises(StartError, match="cannot listen on"):
        await run(settings)


def test_unreachable_registry_fails_to_start_with_one_line() -> None:
    process = start_evaluator("127.0.0.1:1", "digits", "v1", "--wait", "0.3")
    assert process.wait() == 1
    # All other lines are the log's, in JSON.
    assert [line for line in process.lines if not line.startswith("{")] == process.lines[-1:]
    assert process.lines[-1].startswith("evaluator: no registry within 0.3 s: registry 127.0.0.1:1: ")


def test_sigterm_ends_a_net_init_that_never_returns(registry: Registry, tmp_path: Path) -> None:
    never = SCRIPT + b"    import sys, time\n    print('waiting')\n    time.sleep(1000)"
    registry.publish("never-starts", file=digits_tar(tmp_path / "release.tar", **{"net.py": never}))
    process = start_evaluator(registry.address, "never-starts")
    process.logged(event="script printed", text="waiting")
    process.terminate()
    assert process.wait() == 0


def test_a_start_removes_the_workspaces_of_killed_processes_alone(registry: Registry, workspace: Path) -> None:
    def started() -> Process:
        flags = ("--wait", "600", "--workspace", str(workspace), "--log-level", "debug")
        before = {*os.listdir(workspace)} if workspace.exists() else set()
        process = start_evaluator(registry.address, "never-published", "v1", *flags)
        process.logged(event="service starting")
        # It makes its folder right after that.
        wait_for(lambda: workspace.exists() and {*os.listdir(workspace)} - before)
        return process

    living = started()
    (kept,) = os.listdir(workspace)
    killed = started()
    (left,) = {*os.listdir(workspace)} - {kept}
    killed.kill()
    assert {*os.listdir(workspace)} == {kept, left}
    next_one = started()
    assert next_one.logged(event="workspace removed")["path"] == str(workspace / left)
    now = {*os.listdir(workspace)}
    assert kept in now
    assert left not in now
    assert len(now) == 2
    for each in (living, next_one):
        each.terminate()
        assert each.wait() == 0
    assert os.listdir(workspace) == []


def test_sigterm_during_the_start_ends_the_process_cleanly(registry: Registry) -> None:
    process = start_evaluator(f"{registry.address}", "never-published", "v1", "--wait", "600", "--log-level", "debug")
    process.logged(event="service starting")
    process.terminate()
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--app", "a b"], "'a b' should match"),
        (["--allow-network", "10.0.0.1/8"], "has host bits set"),
        (["--allow-network", "10.0.0.1:0"], "has no port between 1 and 65535"),
        (["--advertise", "nowhere"], "'nowhere' is not host:port"),
        (["--registry", "nowhere"], "'nowhere' is not host:port"),
        (["--grace", "-1"], "-1"),
    ],
)
def test_wrong_flag_gives_an_error_of_one_line(flags: list[str], message: str) -> None:
    all_flags = {"--app": "digits", "--version": "v1", "--registry": "127.0.0.1:1"} | {flags[0]: flags[1]}
    command = [sys.executable, "-m", "evaluator", *(part for pair in all_flags.items() for part in pair)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
