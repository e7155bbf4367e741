"""`atserving release` at a real registry: publish, promote, split, roll back, delete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atserving.config import release_key
from tests.processes import Registry
from tests.registry.cli import PUT, Cli

pytestmark = pytest.mark.slow

FILE = "file:///m.tar"


def test_a_release_lives_and_dies(cli: Cli) -> None:
    app = cli.app
    assert cli(*PUT, app, "v1", FILE, "--phase", "production") == f"{app} v1 is published, in production\n"
    assert cli(*PUT, app, "v2", FILE, "--desc", "better") == f"{app} v2 is published, in staging\n"
    cli.register("v1")
    refused = cli.run("release", "promote", app, "v2")
    assert refused.status == 5
    assert refused.err.count("\n") == 1
    assert f"no instance of {app}/v2 is ready" in refused.err
    cli.register("v2")
    split = cli("release", "split", app, "v1=9", "v2=1")
    assert [line.split() for line in split.splitlines()[1:3]] == [["v1", "90.0%", "9", "4"], ["v2", "10.0%", "1", "4"]]
    assert cli("release", "promote", app, "v2", "--exclusive", "-m", "good") == f"{app} v2 is in production\n"
    assert cli.run("release", "show", app, "v1", "-o", "json").json["phase"] == "PHASE_STAGING"
    assert cli("release", "rollback", app).endswith(f"{app} is what it was\n")
    assert cli.run("release", "show", app, "v1", "-o", "json").json["phase"] == "PHASE_PRODUCTION"
    assert cli("release", "demote", app, "v2") == f"{app} v2 is in staging\n"
    running = cli.run("release", "delete", app, "v2")
    assert (running.status, "still has instances" in running.err) == (5, True)
    cli.deregister("v2")
    assert cli("release", "delete", app, "v2") == f"{app} v2 is deleted\n"
    assert cli.run("release", "show", app, "v2").status == 3
    changes = cli.run("release", "history", app, "-o", "json", "-n", "3").json["changes"]
    assert [each["method"] for each in changes] == ["DeleteRelease", "DemoteRelease", "RollbackApp"]
    assert {each["actor"] for each in changes} == {"ada@desk"}
    table = cli("release", "history", app).splitlines()
    assert any("PromoteRelease" in line and "good" in line for line in table)


def test_a_release_is_put_from_the_json_that_etcd_has(cli: Cli, lasting: Registry, tmp_path: Path) -> None:
    fields = {
        "name": cli.app,
        "version": "v1",
        "file": "file:///m.tar",
        "phase": "production",
        "desc": "first",
        "image_width": 225,
        "batch_size": 8,
        "weight": 0.5,
        "use_device": "GPU:1",
        "lastmodified": "2026-01-01T00:00:00Z",
        "custom_files": {"labels": "https://host/labels.csv"},
        "custom_values": {"net": "classify", "limit": 3, "deep": {"a": [1, 2.5, None, True]}},
        "model_params": {"engines": 2},
    }
    path = tmp_path / "release.json"
    path.write_text(json.dumps(fields))
    cli(*PUT, "-f", str(path))
    stored = json.loads(lasting.etcdctl("get", "--print-value-only", release_key(cli.app, "v1")))
    assert stored.pop("lastmodified") > str(fields.pop("lastmodified"))
    assert stored == fields
    # What etcd has can be put again, flags replace fields, and a version of its own is another release.
    path.write_text(json.dumps(stored))
    assert "in staging" in cli(*PUT, "-f", str(path), "--phase", "staging", "--force")
    values = tmp_path / "values.json"
    values.write_text('{"net": "detect"}')
    cli(*PUT, cli.app, "v2", "file:///n.tar", "-f", str(path), "--custom-values", f"@{values}")
    second = cli.run("release", "show", cli.app, "v2", "-o", "json").json
    assert (second["file"], second["custom_values"]) == ("file:///n.tar", {"net": "detect"})
    assert second["model_params"] == {"engines": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fiel": "x"}, "unknown field 'fiel', did you mean 'file'?"),
        ({"phase": "live"}, "phase: should be staging or production"),
        ({"batch_size": "many"}, "batch_size"),
        ({"custom_values": {"a": [2**53 + 1]}}, "custom_values: 9007199254740993 has more than 53 bits"),
        ({"weight": -1}, "weight: "),
        ({"file": "ftp://host/x"}, "file: "),
    ],
)
def test_a_wrong_field_is_named_with_status_6(cli: Cli, tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "release.json"
    path.write_text(json.dumps({"name": cli.app, "version": "v1", "file": FILE, **change}))
    ended = cli.run(*PUT, "-f", str(path))
    assert (ended.status, ended.out, ended.err.count("\n")) == (6, "", 1)
    assert words in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["put", "app", "v1"],
        ["put", "app", "v1", FILE, "--custom-values", "[]"],
        ["put", "app", "v1", FILE, "--custom-values", "@/none"],
        ["put", "-f", "/none"],
        ["split", "app"],
        ["split", "app", "v1=x"],
        ["split", "app", "v1=1", "--by-capacity"],
        ["history"],
        ["rollback", "app", "--defaults"],
        ["split", "app", "v1=1", "v1=2"],
        ["accept-deletions", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_one_line_and_status_2(cli: Cli, arguments: list[str]) -> None:
    ended = cli.run("release", *arguments)
    assert (ended.status, ended.err.count("\n")) == (2, 1)


def test_other_content_is_a_conflict(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE)
    assert cli(*PUT, cli.app, "v1", FILE)
    ended = cli.run(*PUT, cli.app, "v1", "file:///other.tar")
    assert (ended.status, "exists with a different file" in ended.err) == (4, True)


def test_a_dry_run_changes_nothing_and_force_overrides(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE)
    assert cli.run("release", "promote", cli.app, "v1", "--dry-run").status == 5
    assert "dry run" in cli("release", "promote", cli.app, "v1", "--dry-run", "--force")
    assert cli.run("release", "show", cli.app, "v1", "-o", "json").json["phase"] == "PHASE_STAGING"
    cli("release", "promote", cli.app, "v1", "--force")
    assert cli.run("release", "show", cli.app, "v1", "-o", "json").json["phase"] == "PHASE_PRODUCTION"


@pytest.mark.parametrize(
    "arguments",
    [
        ["release", "list", "none"],
        ["release", "history", "none"],
        ["ps", "none"],
        ["release", "promote", "none", "v1", "--wait"],
        ["app", "shadow", "none", "v1-"],
    ],
    ids=" ".join,
)
def test_an_unknown_app_is_one_line_and_status_3(cli: Cli, arguments: list[str]) -> None:
    ended = cli.run(*arguments)
    assert (ended.status, ended.err) == (3, f"atserving: server {cli.server}: unknown app 'none'\n")


def test_a_number_of_instances_is_waited_for(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE)
    cli.register("v1")
    over = cli.run("release", "promote", cli.app, "v1", "--instances", "2", "--timeout", "0.1")
    assert (over.status, "1 of 2 instances" in over.err) == (8, True)
    cli("release", "promote", cli.app, "v1", "--instances", "2", "--dry-run")


def test_the_defaults_have_a_history_and_a_way_back(cli: Cli) -> None:
    cli("worker", "set", "timeout=7s", "-m", "slow nets")
    assert "slow nets" in cli("release", "history", "--defaults")
    assert cli("release", "rollback", "--defaults") == "the defaults are what they were\n"
    assert "7s" not in cli("worker", "show")


def test_put_and_promote_wait_for_an_instance(cli: Cli) -> None:
    putting = cli.start(*PUT, cli.app, "v1", FILE, "--wait")
    assert putting.stdout
    assert putting.stderr
    assert putting.stdout.readline() == f"{cli.app} v1 is published, in staging\n"
    assert putting.stderr.readline() == f"waiting for {cli.app} v1: 0 of 1 ready\n"
    cli.register("v1", digest="0" * 64)
    over = cli.run("release", "promote", cli.app, "v1", "--wait", "--timeout", "0.1")
    assert (over.status, "0 of 1 instances" in over.err, "1 have loaded other content" in over.err) == (8, True, True)
    promoting = cli.start("release", "promote", cli.app, "v1", "--wait")
    assert promoting.stderr
    assert promoting.stderr.readline()
    assert putting.poll() is None
    cli.register("v1")
    assert putting.communicate(timeout=60)[0] == f"{cli.app} v1 is ready: 127.0.0.1:1\n"
    assert promoting.communicate(timeout=60)[0].endswith(f"{cli.app} v1 is in production\n")
    assert (putting.returncode, promoting.returncode) == (0, 0)
    both = cli.start("release", "promote", cli.app, "v1", "--wait", "--instances", "2")
    assert both.stdout
    assert both.stderr
    assert both.stdout.readline() == f"{cli.app} v1 is ready: 127.0.0.1:1\n"
    assert both.stderr.readline() == f"waiting for {cli.app} v1: 1 of 2 ready\n"
    cli.register("v1", id_="second")
    assert both.communicate(timeout=60)[0].count("is ready") == 1
    # Without a number it waits for all that are registered.
    cli.register("v1", digest="0" * 64, id_="second")
    every = cli.start("release", "promote", cli.app, "v1", "--wait")
    assert every.stderr
    assert every.stderr.readline() == f"waiting for {cli.app} v1: 1 of 2 ready\n"
    # One more ready instance takes no place of the one that is not.
    cli.register("v1", id_="third")
    assert every.stderr.readline() == f"waiting for {cli.app} v1: 2 of 3 ready\n"
    cli.deregister("v1", "second")
    assert every.communicate(timeout=60)[0].count("is ready") == 2
    assert every.returncode == 0


def test_a_list_names_what_is_wrong_on_standard_error(cli: Cli, lasting: Registry) -> None:
    cli(*PUT, cli.app, "v1", FILE, "--desc", "with \x1b[31mescapes")
    cli.register("v1", digest="0" * 64)
    lasting.put(f"eval/{cli.app}/v2", {"file": FILE, "weigth": 1})
    lasting.etcdctl("put", release_key(cli.app, "v3"), "{")
    listed = cli.run("release", "list", cli.app)
    rows = [line.split() for line in listed.out.splitlines()]
    assert rows[1][:7] == [cli.app, "v1", "staging", "-", "0", "(+1", "outdated)"]
    assert "\x1b" not in listed.out
    assert len(rows) == 3
    assert any(line.startswith("warning: ") and "weigth" in line for line in listed.err.splitlines())
    assert any(line.startswith("malformed: ") and "v3" in line for line in listed.err.splitlines())
    assert "1 instance has loaded other content: start it again" in cli.run("release", "show", cli.app, "v1").err
    assert "warning: " in cli.run("release", "show", cli.app, "v2").err
    found = cli.run("release", "list", cli.app, "-o", "json").json["releases"]
    assert [each["version"] for each in found] == ["v1", "v2"]


def test_a_rollback_to_a_change(cli: Cli) -> None:
    for version in ("v1", "v2", "v3"):
        cli(*PUT, cli.app, version, FILE)
    second = cli.run("release", "history", cli.app, "-o", "json").json["changes"][1]["revision"]
    cli("release", "rollback", cli.app, "--to", second)
    found = cli.run("release", "list", cli.app, "-o", "json").json["releases"]
    assert [each["version"] for each in found] == ["v1"]
    assert cli.run("release", "rollback", cli.app, "--to", "1").status == 3


def test_a_watch_prints_what_is_there_and_each_change(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE)
    watching = cli.start("release", "watch", cli.app)
    try:
        assert watching.stdout
        assert watching.stdout.readline().startswith(f"app {cli.app} ")
        assert watching.stdout.readline().startswith(f"release {cli.app}/v1 ")
        assert "changes from here on" in watching.stdout.readline()
        cli.register("v1")
        changed = {watching.stdout.readline().split(" {")[0] for _ in range(3)}
        assert changed == {f"app {cli.app}", f"release {cli.app}/v1", f"instance {cli.app}/v1/i"}
    finally:
        watching.kill()
        watching.communicate()
