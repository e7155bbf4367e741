"""The config as files: exported, checked, compared and applied, at a real registry."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.registry.cli import PUT, Cli

pytestmark = pytest.mark.slow

FILE = "file:///m.tar"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def made(cli: Cli) -> None:
    """An app with config of every kind."""
    values = '{"net": "classify", "big": 9007199254740991, "scale": 1.0, "on": "yes", "day": "2026-01-02"}'
    cli(*PUT, cli.app, "v1", FILE, "--phase", "production", "--custom-values", values)
    cli(*PUT, cli.app, "v2", FILE, "--desc", "naïve: #1")
    cli("app", "alias", cli.app, "best=v1")
    cli("worker", "set", cli.app, "timeout=2s")
    cli("worker", "set", cli.app, "v2", "max_concurrent=7")
    cli("access", "set", cli.app, "public=false", "owner=7")


def digest(cli: Cli, version: str) -> str:
    return str(cli.run("release", "show", cli.app, version, "-o", "json").json["digest"])


def test_what_is_exported_is_applied_unchanged_and_restores_all(cli: Cli, file: Path) -> None:
    made(cli)
    exported = cli("config", "export", cli.app)
    document = yaml.safe_load(exported)["apps"][cli.app]
    assert list(document) == ["access", "routing", "worker", "releases"]
    assert document["releases"]["v2"] == {
        "file": FILE,
        "phase": "staging",
        "desc": "naïve: #1",
        "use_device": "CPU",
        "worker": {"max_concurrent": 7},
    }
    file.write_text(exported)
    assert cli("config", "apply", str(file), "--prune") == "nothing changes\n"
    assert cli("config", "diff", str(file), "--prune") == ""
    digests = {
        version: cli.run("release", "show", cli.app, version, "-o", "json").json["digest"] for version in ("v1", "v2")
    }
    cli("app", "delete", cli.app)
    assert cli("config", "apply", str(file), "--yes", "-m", "back").endswith(f"{cli.app}: 6 keys are changed\n")
    assert cli("config", "export", cli.app) == exported
    assert {version: digest(cli, version) for version in ("v1", "v2")} == digests
    change = cli.run("release", "history", cli.app, "-n", "1", "-o", "json").json["changes"][0]
    assert (change["method"], change["message"], len(change["keys"])) == ("ApplyConfig", "back", 6)


def test_a_diff_shows_what_apply_does(cli: Cli, file: Path) -> None:
    made(cli)
    document = yaml.safe_load(cli("config", "export", cli.app))
    app = document["apps"][cli.app]
    app["worker"] = {"timeout": "3s"}
    app["releases"]["v3"] = {"file": FILE}
    del app["releases"]["v2"]
    file.write_text(yaml.safe_dump(document))
    shown = cli.run("config", "diff", str(file))
    assert shown.status == 1
    assert shown.out.splitlines()[0] == f"+ eval/{cli.app}/v3"
    assert f"~ worker/app/{cli.app}/default\n    -timeout: 2s\n    +timeout: 3s\n" in shown.out
    assert "v2" not in shown.out
    pruned = cli.run("config", "diff", str(file), "--prune").out
    assert f"- eval/{cli.app}/v2\n" in pruned
    assert f"- worker/app/{cli.app}/release/v2\n" in pruned
    assert cli.run("config", "apply", str(file), "--prune").status == 130, "nobody has answered"
    dry = cli("config", "apply", str(file), "--prune", "--dry-run")
    assert dry.endswith(f"{cli.app}: 4 keys are changed (dry run: nothing is changed)\n")
    assert cli.run("release", "show", cli.app, "v3").status == 3
    cli("config", "apply", str(file), "--prune", "--yes")
    assert yaml.safe_load(cli("config", "export", cli.app))["apps"][cli.app]["releases"].keys() == {"v1", "v3"}


def test_what_callers_would_lose_by_is_refused(cli: Cli, file: Path) -> None:
    made(cli)
    cli.register("v1")
    cli.register("v2")
    document = yaml.safe_load(cli("config", "export", cli.app))
    releases = document["apps"][cli.app]["releases"]
    releases["v1"]["phase"] = "staging"
    file.write_text(yaml.safe_dump(document))
    refused = cli.run("config", "apply", str(file), "--yes")
    assert (refused.status, "ready instance" in refused.err) == (5, True)
    releases["v1"]["phase"] = "production"
    del releases["v2"]
    file.write_text(yaml.safe_dump(document))
    refused = cli.run("config", "apply", str(file), "--yes", "--prune")
    assert (refused.status, "still has instances" in refused.err) == (5, True)
    releases["v1"]["file"] = "file:///n.tar"
    file.write_text(yaml.safe_dump(document))
    refused = cli.run("config", "apply", str(file), "--yes", "--force")
    assert (refused.status, "exists with a different file" in refused.err) == (4, True)
    assert cli.run("release", "list", cli.app, "--phase", "production").out.count("v1") == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "apps: {a: {releases: {v1: {file: file:///x, batchsize: 4}}}}",
            "warning: /ava/serving/eval/a/v1: unknown field",
        ),
        (
            "apps: {a: {releases: {v1: {phase: production}}}}",
            "malformed: /ava/serving/eval/a/v1: file: ",
        ),
        (
            "apps: {a: {access: {pubilc: false}}}",
            "malformed: /ava/serving/app/metadata/a: unknown",
        ),
        ("apps: {a: {worker: {timeout: soon}}}", "malformed: /ava/serving/worker/app/a/default: timeout: "),
        ("apps: {a: {}, a: {}}", "'a' is there twice"),
        ("apps: {a/b: {}}", "apps.a/b: the name 'a/b' should be a text"),
        ("apps: {1: {}}", "apps.1: the name 1 should be a text"),
        ("apps: {a: {release: {}}}", "apps.a: unknown field 'release'; known are access, routing, worker, releases"),
        ("app: {}", "the document: unknown field 'app'"),
        ("apps: [a]", "apps: should be an object"),
        ("apps: {a: {releases: {v1: text}}}", "apps.a.releases.v1: should be an object"),
        ("apps: {a: {access: {owner: !!python/object:os.system x}}}", "not YAML: "),
        ("{", "not YAML: "),
        ("? [a]\n: 1", "not YAML: a name is no text"),
        ("apps: {a: {worker: {max_concurrent: .inf}}}", "apps.a.worker: no JSON: "),
        ("apps: {a: {releases: {v1: {file: 'file:///x#sha256=...'}}}}", "file: #sha256= should be followed by 64"),
        ("", "no document of config"),
        ("apps: {a: {}}\n---\napps: {a: {}}", "app 'a': in another document, too"),
    ],
)
def test_files_are_checked_without_a_registry(cli: Cli, file: Path, text: str, error: str) -> None:
    file.write_text(text)
    ended = cli.run("config", "check", str(file), ATSERVING_SERVER="127.0.0.1:1")
    assert error in ended.err
    assert ended.status == (0 if error.startswith("warning") else 6)


def test_a_name_twice_in_json_is_an_error(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"apps": {"a": {"access": {"public": false, "public": true}}}}')
    ended = cli.run("config", "check", str(path), ATSERVING_SERVER="127.0.0.1:1")
    assert (ended.status, f"{path}: the name 'public' is there twice" in ended.err) == (6, True)


def test_folders_are_read_as_a_whole(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("apps: {a: {releases: {v1: {file: file:///x, weight: 1}}}}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.json").write_text(
        '{"apps": {"b": {"releases": {"v1": {"file": "file:///x", "weight": 1e5}}}}}'
    )
    (tmp_path / "readme.md").write_text("{")
    assert cli("config", "check", str(tmp_path)) == "the files are right\n"
    assert cli.run("config", "check", str(tmp_path / "none")).status == 2


@pytest.mark.parametrize(("flags", "status"), [((), 1), (("--context", "none"), 2), (("--server", "127.0.0.1:1"), 7)])
def test_a_diff_tells_a_difference_from_an_error(cli: Cli, file: Path, flags: tuple[str, ...], status: int) -> None:
    file.write_text(f"apps: {{{cli.app}: {{worker: {{max_concurrent: 7}}}}}}")
    assert cli.run("config", "diff", str(file), *flags).status == status
