"""The config's keys and values: valid ones, malformed ones, and the error for each."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from datetime import timedelta

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving import config
from atserving.config import AppMetadata, Instance, MalformedConfig, Release, WorkerConfig
from atserving.errors import Unauthenticated
from gate.admission import Caller, admit

RELEASE_KEY = "/ava/serving/eval/app/v1"


def test_a_release_with_unknown_fields_and_large_integers_is_read() -> None:
    value = config.parse(
        RELEASE_KEY,
        b"""{"name": "app", "version": "v1", "file": "http://host/model.tar", "phase": "production", "desc": "d",
        "lastmodified": "2018-11-09T15:30:00Z", "batch_size": 4, "custom_values": {"n": 9007199254740993}, "new": 1}""",
    )
    assert isinstance(value, Release)
    assert (value.phase, value.batch_size, value.custom_values) == ("production", 4, {"n": 9007199254740993})
    assert config.parse(RELEASE_KEY, value.to_json()) == value


def test_a_release_may_omit_the_name_and_version_of_its_key() -> None:
    value = config.parse(RELEASE_KEY, '{"file": "file:///x.tar"}')
    assert isinstance(value, Release)
    assert (value.name, value.version, value.phase) == ("app", "v1", "staging")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "file: the field is missing"),
        ('{"file": "ftp://x"}', "file: "),
        ('{"file": "file:///x", "name": "other"}', "name: is 'other', but the key says 'app'"),
        ('{"file": "file:///x", "phase": "live"}', "phase: "),
        ('{"file": "file:///x", "batch_size": 0}', "batch_size: "),
        ('{"file": "file:///x", "weight": -1}', "weight: "),
        ('{"file": "file:///x", "use_device": "TPU"}', "use_device: "),
        ('{"file": "file:///x", "custom_files": {"tags": "tags.csv"}}', "custom_files.tags: "),
    ],
)
def test_the_error_names_the_wrong_field(value: str, reason: str) -> None:
    with pytest.raises(MalformedConfig) as caught:
        config.parse(RELEASE_KEY, value)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    "key",
    ["/ava/serving/eval/app", "/ava/serving/eval/app/v1/x", "/ava/serving/nothing", "/other/eval/app/v1", "", "/"],
)
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(MalformedConfig, match="unknown key"):
        config.parse(key, "{}")


def release(**fields: object) -> Release:
    return config.validate(Release, {"name": "a", "version": "v", "file": "file:///x", **fields})


def test_the_digest_of_a_release_is_that_of_its_content() -> None:
    digest = release(custom_values={"a": 1, "b": {"c": 2, "d": 3}}).digest
    same = release(
        custom_values={"b": {"d": 3, "c": 2}, "a": 1}, phase="production", desc="d", weight=2, lastmodified="now"
    )
    assert same.digest == digest
    assert same.differing(same) == []
    assert config.parse(RELEASE_KEY, '{"file": "file:///x"}') == config.parse(RELEASE_KEY, '{"file": "file:///x"}')
    others = [
        release(),
        release(name="b"),
        release(version="w"),
        release(file="file:///x#sha256=" + "a" * 64),
        release(batch_size=4),
        release(image_width=4),
        release(use_device="GPU"),
        release(custom_files={"a": "file:///a"}),
        release(model_params={"engines": 1}),
        *(release(custom_values={"a": value}) for value in (1, True, 1.0, [1], [1.0], [True], {"b": 0}, {"b": -0.0})),
        release(custom_values={"a": None}),
    ]
    assert len({each.digest for each in others} | {digest}) == len(others) + 1
    for one in others:
        assert [one == other for other in others] == [one is other for other in others]
        assert [not one.differing(other) for other in others] == [one is other for other in others]


@pytest.mark.parametrize("field", ["phase", "desc", "weight", "lastmodified"])
def test_releases_of_one_content_are_equal_if_nothing_else_differs(field: str) -> None:
    other = release(**{field: 2 if field == "weight" else "production"})
    assert release() == release()
    assert release().digest == other.digest
    assert release() != other
    assert not release().differing(other)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("100ms", 0.1), ("1m30s", 90), ("1.5s", 1.5), (2_000_000, 0.002), (0, 0), ("250us", 0.00025), ("1h", 3600)],
)
def test_a_duration_is_nanoseconds_or_go_notation(text: str | int, seconds: float) -> None:
    value = config.parse(config.DEFAULT_WORKER_KEY, orjson.dumps({"delay4batch": text}))
    assert isinstance(value, WorkerConfig)
    assert value.delay4batch == timedelta(seconds=seconds)
    assert config.parse(config.DEFAULT_WORKER_KEY, value.to_json()) == value


@pytest.mark.parametrize(
    ("timeout", "read_us"), [(0, 0), ("0h0m", 0), (30, 0), (30_000, 30), ("999us", 999), (timedelta(microseconds=5), 5)]
)
def test_a_timeout_that_no_eval_can_meet_is_refused(timeout: object, read_us: int) -> None:
    said = f"timeout: is {read_us} µs, should be at least 1 ms; a number means nanoseconds"
    with pytest.raises(MalformedConfig, match=said):
        config.validate(WorkerConfig, {"timeout": timeout})
    assert config.validate(WorkerConfig, {"timeout": 1_000_000}).timeout == timedelta(milliseconds=1)


@pytest.mark.parametrize("value", ["no", "true", "null", 0, 1, 1.0, []])
def test_only_booleans_are_booleans(value: object) -> None:
    with pytest.raises(MalformedConfig, match="public: "):
        config.validate(AppMetadata, {"public": value})


@pytest.mark.parametrize("value", ["8", 8.5, True, "null"])
def test_only_numbers_are_numbers(value: object) -> None:
    with pytest.raises(MalformedConfig, match="max_concurrent: "):
        config.validate(WorkerConfig, {"max_concurrent": value})


@pytest.mark.parametrize("text", ["soon", "", "1", "1 s", "-1s", -1, 1.5, True, "2h", [1], "1s1"])
def test_an_invalid_duration_is_refused(text: object) -> None:
    with pytest.raises(MalformedConfig, match="timeout: "):
        config.parse(config.DEFAULT_WORKER_KEY, orjson.dumps({"timeout": text}))


def test_the_more_specific_worker_config_wins_field_by_field() -> None:
    general = config.validate(WorkerConfig, {"timeout": "5s", "max_concurrent": 8})
    specific = config.validate(WorkerConfig, {"max_concurrent": 2, "delay4batch": 0})
    assert specific.over(general) == config.validate(
        WorkerConfig, {"timeout": "5s", "max_concurrent": 2, "delay4batch": 0}
    )


def test_an_instance_needs_a_valid_address_and_capacity() -> None:
    value = Instance(app="app", version="v1", id="a", address="[::1]:50052", capacity=4)
    assert config.parse(value.key, value.to_json()) == value
    for address in ("host", "host:", ":1", "host:port", "host:1/x", "a b:1", "host:0", "host:65536"):
        with pytest.raises(MalformedConfig, match="address"):
            config.parse(value.key, orjson.dumps({"address": address, "capacity": 4}))
    with pytest.raises(MalformedConfig, match="capacity"):
        config.parse(value.key, '{"address": "host:1", "capacity": 2147483648000}')


def test_metadata_may_be_empty() -> None:
    assert config.parse("/ava/serving/app/metadata/app", "{}") == AppMetadata()


@pytest.mark.parametrize(
    ("key", "app"),
    [
        ("/ava/serving/eval/a/v", "a"),
        ("/ava/serving/app/metadata/a", "a"),
        ("/ava/serving/worker/app/a/default", "a"),
        ("/ava/serving/worker/app/a/release/v", "a"),
        ("/ava/serving/instance/a/v/i", "a"),
        ("/ava/serving/app/default/metadata", None),
        ("/ava/serving/worker/default", None),
    ],
)
def test_a_key_belongs_to_an_app_or_to_all(key: str, app: str | None) -> None:
    assert config.app_of(key) == app


RULES_KEY, INSTANCE_KEY = "/ava/serving/app/metadata/a", "/ava/serving/instance/a/v/i"
EVERY_KEY = (RELEASE_KEY, RULES_KEY, config.DEFAULT_APP_METADATA_KEY, config.DEFAULT_WORKER_KEY, INSTANCE_KEY)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        *(
            (key, orjson.dumps({f"publik{n}": n for n in range(101)}), "101 unknown fields exceed the limit of 100")
            for key in (
                RELEASE_KEY,
                RULES_KEY,
                config.DEFAULT_APP_METADATA_KEY,
                config.DEFAULT_WORKER_KEY,
                INSTANCE_KEY,
            )
        ),
        (
            RELEASE_KEY,
            b'{"file": "file:///x", "desc": "%s"}' % (b"x" * (1 << 20)),
            "JSON exceed the limit of 1048576",
        ),
        (RULES_KEY, b'{"public": false, "x": [%s[[]]]}' % (b"[[]]," * 9999), "brackets exceed the limit of 20000"),
        (
            config.ACCEPT_KEY,
            b'{"x": [%s1]}' % (b"1," * 20_000),
            "brackets exceed the limit of 20000",
        ),
        (
            RELEASE_KEY,
            orjson.dumps({"file": "file:///x", "custom_files": {str(n): "file:///x" for n in range(1001)}}),
            "custom_files: 1001 files exceed the limit of 1000",
        ),
        (config.DEFAULT_WORKER_KEY, '{"timeout": "%s1s"}' % ("0s" * 40), "timeout: should be nanoseconds"),
        (INSTANCE_KEY, orjson.dumps({"capacity": 1, "address": "a" * 400 + ":1"}), "address: "),
    ],
)
def test_a_value_that_would_cost_its_readers_much_is_malformed(key: str, value: str | bytes, reason: str) -> None:
    for each in (value, value.decode() if isinstance(value, bytes) else value.encode()):
        with pytest.raises(MalformedConfig, match=reason):
            config.parse(key, each)


@pytest.mark.parametrize("field", ["name", "phase"])
def test_the_reason_of_a_malformed_value_is_short(field: str) -> None:
    with pytest.raises(MalformedConfig) as caught:
        config.parse(RELEASE_KEY, orjson.dumps({"file": "file:///x", field: "x" * 100_000}))
    assert len(str(caught.value)) <= 1024


@given(st.text(), st.binary() | st.text())
def test_invalid_keys_and_values_raise_only_malformed_config(key: str, value: bytes | str) -> None:
    for each in (key, config.PREFIX + key, RELEASE_KEY, config.DEFAULT_WORKER_KEY):
        with suppress(MalformedConfig):
            config.read(each, value)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("/ava/serving/app/metadata/a", '{"public": false, "public": true}', "public"),
        (config.DEFAULT_APP_METADATA_KEY, '{"owner": {"uid": 1, "uid": 2}}', "uid"),
        (RELEASE_KEY, '{"file": "file:///x", "custom_values": {"deep": [{"a": 1, "\\u0061": 1}]}}', "a"),
        (config.DEFAULT_WORKER_KEY, '{"timeout": "1s", "x": 1, "x": 2}', "x"),
    ],
)
def test_a_name_is_there_once(key: str, value: str, name: str) -> None:
    for each in (value, value.encode()):
        with pytest.raises(MalformedConfig) as caught:
            config.read(key, each)
        assert str(caught.value) == f"the name '{name}' is there twice"


def test_a_name_may_be_in_several_objects() -> None:
    config.read(RELEASE_KEY, '{"file": "file:///x", "custom_values": {"a": [{"a": 1}, {"a": 1}], "b": {"a": {}}}}')


@given(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"))
def test_a_name_has_no_newline_slash_or_leading_dot(name: str) -> None:
    assert config.is_name(name)
    assert not config.is_name(name + "\n")
    assert not config.is_name(name + "/")
    assert not config.is_name("." + name)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('{"pubilc": false}', "unknown field 'pubilc', did you mean 'public'?"),
        ('{"Public": true}', "unknown field 'Public', did you mean 'public'?"),
        ('{"whitelist": [1], "public": true}', "unknown field 'whitelist', did you mean 'user_whitelist'?"),
        ('{"ownr": {"uid": 1}, "batch_size": 4}', "unknown field 'ownr', did you mean 'owner'?"),
        ('{"private": true}', "unknown field 'private'"),
        ('{"private": true, "batch_size": 4}', "unknown field 'private'"),
        ('{"users": [1]}', "unknown field 'users'"),
        ('{"public": null, "users": [1]}', "unknown field 'users'"),
        ('{"public": null}', "public: null is no rule of access"),
        ('{"owner": null, "user_whitelist": null, "batch_size": 4}', "owner: null is no rule of access"),
    ],
)
@pytest.mark.parametrize("key", ["/ava/serving/app/metadata/a", config.DEFAULT_APP_METADATA_KEY])
def test_misspelt_access_rules_are_malformed(key: str, value: str, reason: str) -> None:
    with pytest.raises(MalformedConfig) as caught:
        config.parse(key, value)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("key", "value", "warning"),
    [
        (RELEASE_KEY, '{"file": "file:///x", "batchsize": 4}', "unknown field 'batchsize', did you mean 'batch_size'?"),
        (config.DEFAULT_WORKER_KEY, '{"maxConcurrent": 4}', "unknown field 'maxConcurrent', did you mean 'max_conc"),
        (config.DEFAULT_WORKER_KEY, '{"x": 4, "y": 5}', "unknown field 'x'; unknown field 'y'"),
        (config.DEFAULT_WORKER_KEY, orjson.dumps({f"x{n}": n for n in range(99)}), "; 89 more unknown fields"),
        ("/ava/serving/app/metadata/a", '{"public": true, "quota": 4}', "unknown field 'quota'"),
        ("/ava/serving/app/metadata/a", '{"public": true}', ""),
    ],
)
def test_unknown_fields_are_warned_of_with_the_nearest_known_name(key: str, value: str, warning: str) -> None:
    said = config.read(key, value)[1]
    assert warning in said
    assert bool(warning) == bool(said)


@pytest.mark.parametrize(
    ("value", "closed"),
    [
        ('{"batch_size": 4}', False),
        ('{"batch_size": null}', False),
        ('{"public": true, "users": [1]}', False),
        ('{"public": true, "owner": null}', False),
        ('{"public": false, "users": [1]}', True),
        ('{"owner": {"uid": 1}, "users": [1], "user_whitelist": null}', True),
    ],
)
def test_fields_that_are_no_rules_leave_an_app_as_its_rules_say(value: str, closed: bool) -> None:
    rules = config.parse(RULES_KEY, value)
    assert isinstance(rules, AppMetadata)
    with pytest.raises(Unauthenticated) if closed else nullcontext():
        admit(Caller(), "a", rules, AppMetadata())


@pytest.mark.parametrize("field", ["public", "owner", "user_whitelist", "batch_size"])
def test_the_text_null_is_no_null(field: str) -> None:
    with pytest.raises(MalformedConfig, match=field):
        config.parse("/ava/serving/app/metadata/a", orjson.dumps({field: "Null"}))
