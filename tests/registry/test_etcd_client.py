"""The etcd client against real members: rotation, permissions, TLS, leases, watches."""

from __future__ import annotations

import asyncio
import gc
import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest

from atserving.config import PREFIX
from atserving.local.authority import ETCD, LOCAL, Authority
from atserving.local.ports import free_ports
from atserving.tls import REGISTRY, TlsFiles
from atserving.v1 import etcd_pb2
from registry.etcd import (
    Compacted,
    Connection,
    EtcdClient,
    EtcdRefused,
    EtcdUnavailable,
    LeaseNotFound,
    Tls,
    User,
    put,
    written_at,
)
from tests.processes import Etcd, Process, cluster
from tests.registry.etcd_users import USER, enable_rights
from tests.waiting import until, until_async

KEY = f"{PREFIX}worker/default"
_numbers = itertools.count()


@pytest.fixture
def key() -> str:
    """A key of the test's own, in the etcd that the tests share."""
    return f"/etcd-client/{next(_numbers)}"


@pytest.fixture
async def shared_client(shared_etcd: Etcd) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(Connection([shared_etcd.address])) as client:
        yield client


async def test_a_commit_fails_if_the_key_was_written_in_between(shared_client: EtcdClient, key: str) -> None:
    first = await shared_client.commit([written_at(key, 0)], [put(key, "1")])
    assert first
    assert await shared_client.commit([written_at(key, 0)], [put(key, "2")]) is None
    assert await shared_client.commit([written_at(key, first)], [put(key, "3")])
    kv = await shared_client.get(key)
    assert kv
    assert kv.value == b"3"


async def test_an_old_revision_can_be_read_until_its_compaction(
    shared_etcd: Etcd, shared_client: EtcdClient, key: str
) -> None:
    first = await shared_client.put(key, "1")
    second = await shared_client.put(key, "2")
    kv = await shared_client.get(key, first)
    assert kv
    assert kv.value == b"1"
    shared_etcd.ctl("compact", str(second))
    with pytest.raises(Compacted):
        await shared_client.get(key, first)
    with pytest.raises(EtcdRefused, match="future revision"):
        await shared_client.get(key, second + 100)


async def test_a_watch_from_a_compacted_revision_raises_compacted(
    shared_etcd: Etcd, shared_client: EtcdClient, key: str
) -> None:
    await shared_client.put(key, "1")
    shared_etcd.ctl("compact", str(await shared_client.put(key, "2")))
    async with aclosing(shared_client.watch(key, 1)) as responses:
        with pytest.raises(Compacted):
            async for _ in responses:
                pass


async def test_revoking_a_lease_deletes_its_key(shared_client: EtcdClient, key: str) -> None:
    lease = await shared_client.grant(60)
    await shared_client.put(key, "1", lease.id)
    assert await shared_client.keep_alive(lease.id) == lease.ttl_s == 60
    await shared_client.revoke(lease.id)
    assert await shared_client.get(key) is None
    with pytest.raises(LeaseNotFound):
        await shared_client.keep_alive(lease.id)
    with pytest.raises(LeaseNotFound):
        await shared_client.put(key, "1", lease.id)
    await shared_client.revoke(lease.id)


async def test_a_client_rotates_to_the_member_that_answers(shared_etcd: Etcd, key: str) -> None:
    unreachable = [f"127.0.0.1:{port}" for port in free_ports(2)]
    async with EtcdClient(Connection([*unreachable, shared_etcd.address])) as client:
        assert await client.get(key) is None
        # A write is tried once, so it shows that the client stays at the member that answered.
        assert await client.put(key, "1")


async def test_the_error_names_every_unreachable_member() -> None:
    unreachable = [f"127.0.0.1:{port}" for port in free_ports(2)]
    async with EtcdClient(Connection(unreachable)) as client:
        with pytest.raises(EtcdUnavailable) as failed:
            await client.get(KEY)
    for address in unreachable:
        assert f"{address}: " in str(failed.value)
    assert "Connection refused" in str(failed.value)


async def test_a_client_rotates_away_from_a_frozen_member(members: list[Etcd]) -> None:
    async with EtcdClient(Connection([member.address for member in members], try_timeout_s=0.5)) as client:
        await until_async(lambda: client.put(KEY, "1"), EtcdUnavailable)
        members[0].freeze()
        await until_async(lambda: client.get(KEY), EtcdUnavailable)
        await until_async(lambda: client.put(KEY, "2"), EtcdUnavailable)


async def test_a_watch_on_a_member_without_quorum_ends(members: list[Etcd]) -> None:
    connection = Connection([members[0].address])
    async with EtcdClient(connection) as client, aclosing(client.watch(PREFIX, 1)) as responses:
        await anext(responses)
        members[1].freeze()
        members[2].kill()
        with pytest.raises(EtcdUnavailable):
            await anext(responses)


async def test_a_watch_on_a_frozen_member_ends(etcd: Etcd) -> None:
    connection = Connection([etcd.address], try_timeout_s=0.5)
    async with EtcdClient(connection) as client, aclosing(client.watch(PREFIX, 1)) as responses:
        await anext(responses)
        etcd.freeze()
        with pytest.raises(EtcdUnavailable, match="does not answer"):
            await anext(responses)


async def test_a_transaction_without_an_answer_is_not_retried() -> None:
    calls = []

    async def refuse(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        calls.append(etcd_pb2.TxnRequest.FromString(request))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed")
        return b""

    server = grpc.aio.server()
    handlers = {"Txn": grpc.unary_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("etcdserverpb.KV", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with EtcdClient(Connection([f"127.0.0.1:{port}"] * 2)) as client:
        with pytest.raises(EtcdUnavailable, match="leader changed"):
            await client.txn([], [put(KEY, "1")])
        assert len(calls) == 1
        assert await client.commit([], [put(KEY, "1")]) is None
        assert len(calls) == 2
    await server.stop(None)


async def test_a_user_may_do_what_its_role_permits(etcd: Etcd, client: EtcdClient) -> None:
    async with EtcdClient(Connection([etcd.address], user=USER)) as user:
        # etcd accepts a client with a user while authentication is disabled.
        await user.put(KEY, "1")
        enable_rights(etcd)
        await user.put(KEY, "2")
        assert len((await user.snapshot(PREFIX)).kvs) == 1
        assert await user.keep_alive((await user.grant(60)).id) == 60
        async with aclosing(user.watch(PREFIX, 1)) as responses:
            await anext(responses)
            assert len((await anext(responses)).events) == 2
        with pytest.raises(EtcdRefused, match="permission denied"):
            await user.put("/elsewhere", "1")
        with pytest.raises(EtcdRefused, match="permission denied"):
            async with aclosing(user.watch("/elsewhere", 1)) as responses:
                await anext(responses)
    with pytest.raises(EtcdRefused, match="user name is empty"):
        await client.get(KEY)


async def test_a_wrong_password_is_refused_and_not_in_the_error(etcd: Etcd) -> None:
    enable_rights(etcd)
    wrong = User(USER.name, "wrong-password")
    async with EtcdClient(Connection([etcd.address], user=wrong)) as client:
        with pytest.raises(EtcdRefused, match="invalid user ID or password") as failed:
            await client.get(KEY)
    assert wrong.password not in f"{failed.value!r} {wrong!r}"


async def test_a_token_is_renewed_after_a_restart_of_etcd(etcd: Etcd) -> None:
    enable_rights(etcd)
    async with EtcdClient(Connection([etcd.address], user=USER)) as client:
        await client.put(KEY, "1")
        etcd.kill()
        etcd.start()
        await etcd.ready()
        await until_async(lambda: client.get(KEY), EtcdUnavailable)
        await client.put(KEY, "2")


async def test_an_expired_token_is_renewed(tmp_path: Path, processes: Callable[[Process], Process]) -> None:
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    openssl("genrsa", "-out", str(private), "2048")
    openssl("rsa", "-in", str(private), "-pubout", "-out", str(public))
    jwt = f"jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl=1s"
    (etcd,) = cluster(tmp_path, ["one"], "--auth-token", jwt)
    processes(etcd)
    await etcd.ready()
    enable_rights(etcd)
    connection = Connection([etcd.address], user=USER)
    async with EtcdClient(connection) as client:
        await client.put(KEY, "1")
        old = connection._token
        assert old

        async def renewed() -> bool:
            await client.put(KEY, "2")
            return connection._token != old

        await until_async(renewed)
        # A change of permissions invalidates every token.
        etcd.ctl("role", "grant-permission", "serving", "--prefix=true", "readwrite", "/more/")
        await client.put("/more/", "1")


def openssl(*arguments: str) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


async def test_tls_with_a_client_certificate(tmp_path: Path, processes: Callable[[Process], Process]) -> None:
    authority, stranger = Authority(tmp_path / "trusted"), Authority(tmp_path / "stranger")
    own = authority.issue(REGISTRY)
    etcd = await tls_member(tmp_path, authority.issue(ETCD, LOCAL), own, processes)
    async with EtcdClient(Connection([etcd.address], tls=Tls(own.ca, own.cert, own.key))) as client:
        await client.put(KEY, "1")
        assert await client.get(KEY)
    other = stranger.issue(REGISTRY)
    for refused in (Tls(other.ca, own.cert, own.key), Tls(own.ca, other.cert, other.key), Tls(own.ca), None):
        async with EtcdClient(Connection([etcd.address], tls=refused)) as client:
            with pytest.raises(EtcdUnavailable):
                await client.get(KEY)


async def tls_member(folder: Path, files: TlsFiles, client: TlsFiles, processes: Callable[[Process], Process]) -> Etcd:
    """Start etcd with TLS; etcdctl has the client's files."""
    tls = ["--cert-file", str(files.cert), "--key-file", str(files.key), "--trusted-ca-file", str(files.ca)]
    (etcd,) = cluster(folder, ["one"], "--client-cert-auth", *tls)
    etcd.ctl_flags = ["--cacert", str(client.ca), "--cert", str(client.cert), "--key", str(client.key)]
    processes(etcd)
    await etcd.ready()
    return etcd


async def test_renewed_certificates_are_for_new_calls_while_a_stream_goes_on(
    tmp_path: Path, processes: Callable[[Process], Process]
) -> None:
    authority = Authority(tmp_path / "authority")
    own = authority.issue(REGISTRY)
    etcd = await tls_member(tmp_path, authority.issue(ETCD, LOCAL), own, processes)
    followed = Tls(own.ca, own.cert, own.key)
    async with EtcdClient(Connection([etcd.address], tls=followed)) as client, aclosing(client.watch("/", 1)) as watch:
        assert await anext(watch)
        before = followed.credentials
        authority.issue(REGISTRY)
        await client.put(KEY, "1")
        assert followed.credentials is not before
        gc.collect()
        assert (await anext(watch)).events
        # Wrong files change nothing.
        before = followed.credentials
        own.key.unlink()
        await client.put(KEY, "2")
        assert (await anext(watch)).events
        assert followed.credentials is before


async def test_a_silent_watch_tells_the_revision_of_etcd(etcd: Etcd) -> None:
    heard: list[int] = []
    async with (
        EtcdClient(Connection([etcd.address])) as client,
        aclosing(client.watch(PREFIX, 1, is_at=heard.append)) as responses,
    ):
        await anext(responses)
        waiting = asyncio.ensure_future(anext(responses))
        elsewhere = await client.put("/elsewhere", "1")
        await until(lambda: elsewhere in heard)
        waiting.cancel()
        await asyncio.wait({waiting})


async def test_calls_to_etcd_are_counted_by_the_kind_of_their_error(etcd: Etcd) -> None:
    gone = f"127.0.0.1:{free_ports(1)[0]}"
    async with EtcdClient(Connection([gone, etcd.address])) as client:
        assert await client.get("/k") is None
        first = await client.put("/k", "1")
        tries = client.counts.tries
        assert (tries["Range", "unavailable"], tries["Range", "ok"], tries["Put", "ok"]) == (1, 1, 1)
        assert client.counts.switches == 1
        second = await client.put("/k", "2")
        etcd.ctl("compact", str(second))
        with pytest.raises(Compacted):
            await client.get("/k", first)
        watch = client.watch("/k", first)
        await anext(watch)
        with pytest.raises(Compacted):
            await anext(watch)
        assert tries["Range", "compacted"] == tries["Watch", "compacted"] == 1
        with pytest.raises(LeaseNotFound):
            await client.keep_alive(12345)
        assert tries["LeaseKeepAlive", "lease_gone"] == 1
        etcd.freeze()

        async def times_out() -> bool:
            with suppress(EtcdUnavailable):
                await client.put("/k", "3")
            return tries["Put", "timeout"] > 0

        await until_async(times_out)
