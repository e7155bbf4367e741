"""`atserving app`, `worker`, `access`, `instance` and `ps` at a real registry; the choice of a server; completion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.processes import Etcd, Process, Registry
from tests.registry.cli import PUT, Cli
from tests.waiting import until

pytestmark = pytest.mark.slow

FILE = "file:///m.tar"


def test_an_app_has_shares_and_aliases(cli: Cli) -> None:
    for version in ("v1", "v2"):
        cli(*PUT, cli.app, version, FILE, "--phase", "production", "--force")
        cli.register(version, capacity=3 if version == "v1" else 1)
    assert cli("app", "alias", cli.app, "best=v2") == f"{cli.app} best is v2\n"
    shown = cli("app", "show", cli.app)
    assert "aliases:    best=v2" in shown
    shares = [line.split() for line in shown.splitlines()[-2:]]
    assert shares == [["v1", "75.0%", "-", "3"], ["v2", "25.0%", "-", "1"]]
    assert "v1 75.0%, v2 25.0%" in cli("app", "list", "--filter", cli.app)
    assert cli.run("release", "show", cli.app, "best", "-o", "json").json["aliases"] == ["best"]
    assert cli.run("app", "alias", cli.app, "best=v9").status == 6
    assert cli.run("app", "alias", cli.app, "best").status == 2
    cli("app", "alias", cli.app, "best-")
    assert "aliases" not in cli.run("app", "show", cli.app, "-o", "json").json
    assert cli.run("app", "delete", cli.app).status == 5
    for version in ("v1", "v2"):
        cli.deregister(version)
    cli("app", "delete", cli.app, "--force")
    assert cli.run("app", "show", cli.app).status == 3


def test_worker_settings_come_from_three_levels(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE)
    cli("worker", "set", cli.app, "timeout=2s", "max_concurrent=32")
    cli("worker", "set", cli.app, "v1", "timeout=1m30s")
    rows = [line.split() for line in cli("worker", "show", cli.app, "v1").splitlines()[1:]]
    assert [row[:3] for row in rows] == [
        ["timeout", "90s", "version"],
        ["max_concurrent", "32", "app"],
        ["delay4batch", "0s", "built"],
        ["wait_for_instance", "0s", "built"],
        ["fetch_allow", '["*"]', "built"],
        ["fetch_deny", "[]", "built"],
        ["scripts", "allow", "built"],
    ]
    cli("worker", "unset", cli.app, "v1")
    cli("worker", "unset", cli.app, "--field", "max_concurrent")
    assert [line.split() for line in cli("worker", "show", cli.app).splitlines()[1:]] == [
        ["timeout", "2s"],
        ["max_concurrent", "-"],
        ["delay4batch", "-"],
        ["wait_for_instance", "-"],
        ["fetch_allow", "-"],
        ["fetch_deny", "-"],
        ["scripts", "-"],
    ]
    assert cli.run("worker", "unset", cli.app, "v1").status == 3
    cli("worker", "set", cli.app, "fetch_allow=*.example.com,10.0.0.0/8", "fetch_deny=")
    shown = dict(line.split() for line in cli("worker", "show", cli.app).splitlines())
    assert (shown["fetch_allow"], shown["fetch_deny"]) == ("*.example.com,10.0.0.0/8", "none")
    wrong = cli.run("worker", "set", cli.app, "fetch_deny=a.example,10.0.0.1/8")
    assert (wrong.status, "fetch_deny[1]: 10.0.0.1/8 has host bits set" in wrong.err) == (6, True)
    wrong = cli.run("worker", "set", cli.app, "max_concurrent=0")
    assert (wrong.status, "max_concurrent: " in wrong.err) == (6, True)
    wrong = cli.run("worker", "set", cli.app, "scripts=never")
    assert (wrong.status, "scripts: " in wrong.err) == (6, True)
    for arguments in (
        ["timeout=x"],
        ["max_concurrent=99999999999"],
        ["threads=2"],
        [],
        ["timeout=1s", "v1"],
        ["v1", "v2", "timeout=1s"],
    ):
        assert cli.run("worker", "set", cli.app, *arguments).status == 2


def test_access_rules(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE)
    cli("access", "set", cli.app, "public=false", "owner=7", "user_whitelist=1,2", "group_whitelist=a,b")
    assert [line.split(maxsplit=1) for line in cli("access", "show", cli.app).splitlines()[1:]] == [
        ["public", "false"],
        ["owner", "7"],
        ["user_whitelist", "1, 2"],
        ["group_whitelist", "a, b"],
        *([name, "-"] for name in ("max_requests_per_second", "max_in_flight", "max_bytes_per_minute")),
    ]
    cli("access", "unset", cli.app, "--field", "owner")
    found = cli.run("access", "show", cli.app, "-o", "json").json
    assert (found["public"], "owner" in found, found["user_whitelist"]) == (False, False, {"uids": ["1", "2"]})
    assert found["group_whitelist"] == {"names": ["a", "b"]}
    assert cli.run("access", "set", cli.app, "group_whitelist=with space").status == 6
    cli("access", "set", cli.app, "max_requests_per_second=2.5", "max_in_flight=3", "max_bytes_per_minute=20MB")
    found = cli.run("access", "show", cli.app, "-o", "json").json
    assert (found["max_requests_per_second"], found["max_in_flight"], found["max_bytes_per_minute"]) == (
        2.5,
        3,
        "20000000",
    )
    for wrong in ("max_requests_per_second=x", "max_in_flight=1.5", "max_bytes_per_minute=1.5MB"):
        assert cli.run("access", "set", cli.app, wrong).status == 2
    for wrong in ("max_requests_per_second=0", "max_in_flight=0", "max_bytes_per_minute=0"):
        assert cli.run("access", "set", cli.app, wrong).status == 6
    cli("access", "unset", cli.app)
    assert cli.run("access", "unset", cli.app).status == 3


def test_instances_are_listed(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE)
    cli.register("v1", digest="0" * 64, id_="a")
    cli.register("v1", id_="b")
    rows = [line.split() for line in cli("ps", cli.app, "--no-load").splitlines()[1:]]
    assert rows == [
        [cli.app, "v1", "a", "127.0.0.1:1", "4", "outdated", "-", "-"],
        [cli.app, "v1", "b", "127.0.0.1:1", "4", "-", "-", "-"],
    ]
    assert "unreachable: " in cli("instance", "list", cli.app, "v1")
    assert len(cli.run("ps", cli.app, "--no-load", "-o", "json").json["instances"]) == 2


def test_deletions_that_are_held_back_are_accepted(
    tmp_path: Path, etcd: Etcd, processes: Callable[[Process], Process]
) -> None:
    registry = Registry(tmp_path, [etcd.address])
    processes(registry)
    registry.wait_serving()
    cli = Cli(registry.address, "app")
    for version in ("v1", "v2", "v3"):
        cli(*PUT, "app", version, FILE)
    etcd.ctl("del", "--prefix", "/ava/serving/eval/")
    registry.logged(event="deletions held")
    assert "held back: /ava/serving/eval/app/v1" in cli.run("release", "list").err
    assert cli("release", "accept-deletions") == "deletions are taken at once for 60 s\n"
    assert cli.run("release", "list").err == ""


def test_a_server_that_is_away_is_passed_over(cli: Cli) -> None:
    away = "127.0.0.1:1"
    assert cli.run(*PUT, cli.app, "v1", FILE, "--server", f"{away},{cli.server}").status == 0
    listed = cli.run("release", "list", cli.app, "--registry", f"{away},{cli.server}")
    assert cli.app in listed.out
    nobody = cli.run("release", "list", "--server", away)
    assert (nobody.status, nobody.err.count("\n"), away in nobody.err) == (7, 1, True)


async def test_only_reads_move_on_from_a_server_without_etcd(
    cli: Cli, etcd: Etcd, tmp_path: Path, processes: Callable[[Process], Process]
) -> None:
    # It starts while etcd is down, so it has nothing to say.
    etcd.kill()
    empty = Registry(tmp_path, [etcd.address])
    processes(empty)
    await until(lambda: "service starting" in empty.log_text())
    both = f"{empty.address},{cli.server}"
    cli(*PUT, cli.app, "v1", FILE)
    read = cli.run("release", "show", cli.app, "v1", "--server", both)
    assert read.status == 0
    written = cli.run(*PUT, cli.app, "v2", FILE, "--server", both)
    assert (written.status, empty.address in written.err) == (7, True)
    assert cli.run("release", "show", cli.app, "v2").status == 3


def complete(cli: Cli, *words: str, **environment: str) -> list[str]:
    """Return what a shell offers for the last word."""
    variables = {
        "_ATSERVING_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["atserving", *words]),
        "COMP_CWORD": str(len(words)),
    }
    ended = cli.run(**variables, **environment)
    assert (ended.status, ended.err) == (0, "")
    return [line.partition(",")[2] for line in ended.out.splitlines() if line]


def test_a_shell_completes_names(cli: Cli) -> None:
    for version in ("v1", "v2"):
        cli(*PUT, cli.app, version, FILE)
    cli("app", "alias", cli.app, "best=v2")
    assert cli.app in complete(cli, "release", "show", cli.app[:-1])
    assert complete(cli, "release", "show", cli.app, "") == ["best", "v1", "v2"]
    assert complete(cli, "release", "split", cli.app, "v") == ["v1=", "v2="]
    assert complete(cli, "app", "alias", cli.app, "b") == ["best-", "best="]
    assert complete(cli, "worker", "show", cli.app, "v") == ["v1", "v2"]
    assert cli.app in complete(cli, "worker", "set", cli.app[:-1])
    assert complete(cli, "access", "set", cli.app, "pub") == ["public="]
    assert complete(cli, "release", "show", cli.app, "", ATSERVING_SERVER="127.0.0.1:1") == []


def test_formats(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE, "--custom-values", '{"net": "classify", "no": [1, "on"]}')
    cli.register("v1")
    as_json = cli.run("release", "show", cli.app, "v1", "-o", "json").json
    assert yaml.safe_load(cli("release", "show", cli.app, "v1", "-o", "yaml")) == as_json
    listed = cli("release", "list", cli.app, "-o", "wide")
    assert (as_json["digest"] in listed, FILE in listed) == (True, True)
    assert as_json["digest"] in cli("ps", cli.app, "-o", "wide")
    assert as_json["digest"] not in cli("ps", cli.app)
    assert yaml.safe_load(cli("ps", cli.app, "-o", "yaml"))["instances"][0]["id"] == "i"


def test_a_header_of_keys_is_in_lower_case(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE)
    assert "x-user" in cli("app", "key-header", cli.app, "X-User")
    assert cli.run("app", "show", cli.app, "-o", "json").json["key_header"] == "x-user"


def test_only_the_shadow_is_ended(cli: Cli) -> None:
    cli(*PUT, cli.app, "v1", FILE, "--phase", "production")
    cli(*PUT, cli.app, "v2", FILE)
    cli("app", "shadow", cli.app, "v2=10")
    other = cli.run("app", "shadow", cli.app, "v9-")
    assert (other.status, other.err) == (3, f"atserving: v9 is no shadow of {cli.app}: v2\n")
    assert cli("app", "shadow", cli.app, "v2-") == f"{cli.app} has no shadow\n"
    assert cli.run("app", "shadow", cli.app, "v2-").status == 3
