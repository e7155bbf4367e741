"""A hostile net.py reaches for what it must not, in a real evaluator; each attempt is refused for its own reason."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.evaluator.calling import ask, connected
from tests.evaluator.sandbox.attacks import request
from tests.evaluator.sandbox.conftest import SECRET, Host

REFUSED = {"refused": errno.EACCES}
NOT_PERMITTED = {"refused": errno.EPERM}


async def test_script_gets_no_variable_but_those_that_libraries_need(host: Host) -> None:
    found = (await host.hostile.run("found = dict(os.environ)"))["found"]
    assert SECRET not in str(found)
    assert not [name for name in found if name.startswith("ATSERVING")]
    scratch = found["HOME"]
    assert Path(scratch).is_relative_to(host.folder / "workspaces")
    assert (found["LANG"], found["TMPDIR"]) == ("C.UTF-8", scratch)


async def test_script_has_no_descriptor_of_the_front(host: Host) -> None:
    code = """
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            pass
    """
    found = (await host.hostile.run(code))["found"]
    # The folder is the one that lists them, and the worker's own.
    assert {path.partition(":")[0] for path in found if not path.startswith("/proc/")} == {
        *("/dev/null", "/memfd", "socket", "pipe"),
    }


@pytest.mark.parametrize("name", ["environ", "cmdline", "mem", "maps", "status", "fd/0", "task", "root/etc/hostname"])
async def test_script_can_not_read_what_the_kernel_tells_of_other_processes(host: Host, name: str) -> None:
    for pid in (host.hostile.process.pid, host.other.process.pid, 1):
        assert await host.hostile.run(f"os.open('/proc/{pid}/{name}', os.O_RDONLY)") == REFUSED


@pytest.mark.parametrize(
    "code",
    ["call(PTRACE, 16, FRONT, 0, 0)", "call(READ_MEMORY, FRONT, None, 0, None, 0, 0)", "call(TAKE_FILE, 0, 0, 0)"],
)
async def test_script_can_not_trace_the_front(host: Host, code: str) -> None:
    assert await host.hostile.run(code) == NOT_PERMITTED


async def test_script_can_not_read_files_of_others(host: Host) -> None:
    (other,) = (host.folder / "workspaces").glob("*-other-v1-*")
    files = [
        *(host.keys, host.keys.parent, host.folder / "other.tar"),
        *(other, other / "release", other / "release" / "net.py", other / "scratch"),
        *map(Path, ("/etc/shadow", "/etc/ssl/private", "/etc/hostname", "/root", "/home", "/tmp", "/var")),
        *map(Path, ("/", "/proc", "/dev")),
        *(host.registry.log, Path(__file__), Path("/dev/shm")),
    ]
    for file in files:
        if file.exists():
            assert await host.hostile.run(f"os.open('{file}', os.O_RDONLY)") == REFUSED, file


async def test_script_reads_its_release_and_writes_its_scratch_folder(host: Host) -> None:
    code = """
    Path("made").mkdir()
    Path("made/file").write_text("1")
    Path("made/touched").touch()
    Path("made/touched").unlink()
    Path("made/file").rename("moved")
    subprocess.run(["sh", "-c", "cat moved > copied"], check=True)
    found = [Path("copied").read_text(), "net_init" in Path(cfg["tar_files"]["net.py"]).read_text()]
    found.append(Path(cfg["custom_files"]["custom"]).read_text())
    for name in ("moved", "copied"):
        Path(name).unlink()
    os.rmdir("made")
    """
    assert await host.hostile.run(code) == {"found": ["1", True, "custom"]}


@pytest.mark.parametrize(
    "code",
    [
        "open(cfg['tar_files']['net.py'], 'a')",
        "os.unlink(cfg['tar_files']['net.py'])",
        "open(cfg['custom_files']['custom'], 'a')",
        "os.truncate(cfg['tar_files']['net.py'], 0)",
        "open('../file', 'w')",
        "open('../.atserving-workspace', 'w')",
        "os.rename('../release', '../other')",
        "open('/tmp/file', 'w')",
        "os.mkdir('/tmp/folder')",
        "open('/dev/shm/file', 'w')",
        "open('/proc/self/oom_score_adj', 'w')",
        "os.truncate(KEYS, 0)",
        "os.link(cfg['tar_files']['net.py'], 'link')",
        "os.mknod('device', 0o20600, os.makedev(1, 1))",
        "open('/dev/tty', 'w')",
    ],
)
async def test_script_writes_nothing_else(host: Host, code: str) -> None:
    found = await host.hostile.run(code.replace("KEYS", repr(str(host.keys))))
    # Linking to another folder needs a right that neither has.
    assert found["refused"] in (errno.EACCES, errno.EPERM, errno.EXDEV)
    assert host.keys.stat().st_size


@pytest.mark.parametrize(
    "family",
    [
        "socket.AF_INET, socket.SOCK_STREAM",
        "socket.AF_INET6, socket.SOCK_STREAM",
        "socket.AF_INET, socket.SOCK_DGRAM",
        "socket.AF_INET, socket.SOCK_RAW, 1",
        "socket.AF_UNIX, socket.SOCK_STREAM",
        "socket.AF_NETLINK, socket.SOCK_RAW",
        "socket.AF_PACKET, socket.SOCK_RAW",
        "socket.AF_VSOCK, socket.SOCK_STREAM",
    ],
)
async def test_script_has_no_network(host: Host, family: str) -> None:
    assert await host.hostile.run(f"socket.socket({family})") == REFUSED


async def test_script_can_not_reach_the_registry(host: Host) -> None:
    port = host.registry.address.rpartition(":")[2]
    assert await host.hostile.run(f"socket.create_connection(('127.0.0.1', {port}))") == REFUSED


async def test_script_may_use_pipes_pairs_of_sockets_and_processes(host: Host) -> None:
    code = """
    import multiprocessing
    os.pipe()
    socket.socketpair()
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=theirs.send, args=("sent",))
    child.start()
    found = [ours.recv(), subprocess.run(["echo", "1"], capture_output=True, text=True).stdout]
    child.join()
    """
    assert await host.hostile.run(code) == {"found": ["sent", "1\n"]}


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(FRONT, 0)",
        "os.kill(FRONT, signal.SIGKILL)",
        "signal.pidfd_send_signal(os.pidfd_open(FRONT), signal.SIGKILL)",
        "os.kill(OTHER, signal.SIGSTOP)",
        "os.killpg(os.getpgid(FRONT), signal.SIGTERM)",
    ],
)
async def test_script_can_not_signal_other_processes(host: Host, code: str) -> None:
    code = code.replace("OTHER", str(host.other.process.pid))
    assert await host.hostile.run(code) == NOT_PERMITTED
    assert host.hostile.process.is_running


@pytest.mark.parametrize(
    "code",
    [
        "subprocess.run(['true'], start_new_session=True)",
        "subprocess.run(['true'], process_group=0)",
        "call(UNSHARE, 0x10000000)",
        "call(UNSHARE, 0x40000000)",
        "call(IO_URING, 1, None)",
        "call(KEYS, 0, 0, 0, 0, 0)",
        "os.setuid(1)",
        "os.chroot('.')",
        "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    ],
)
async def test_script_gets_no_rights(host: Host, code: str) -> None:
    found = await host.hostile.run(code)
    assert found["refused"] in (errno.EPERM, errno.EACCES)


@pytest.mark.parametrize(
    "code",
    [
        "resource.prlimit(FRONT, resource.RLIMIT_CPU, (1, 1))",
        "os.setpriority(os.PRIO_PROCESS, FRONT, 19)",
        "os.sched_setscheduler(FRONT, os.SCHED_IDLE, os.sched_param(0))",
        "call(WATCH, 0, b'/tmp', 0x100)",
    ],
)
async def test_script_can_not_slow_down_or_watch_other_processes(host: Host, code: str) -> None:
    assert await host.hostile.run(code) == NOT_PERMITTED


async def test_script_does_not_change_the_rights_of_files(host: Host) -> None:
    before = host.keys.stat()
    code = f"""
    for path in ({str(host.keys)!r}, cfg["tar_files"]["net.py"]):
        os.chmod(path, 0o777)
        os.chown(path, 1, 1)
    try:
        os.setxattr(path, "user.x", b"1")
    except OSError as error:
        found = error.errno
    """
    # Landlock knows none of these; what copies files, as shutil does, counts on them.
    assert await host.hostile.run(code) == {"found": errno.EOPNOTSUPP}
    after = host.keys.stat()
    assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)
    copying = "import shutil\nshutil.copy2(cfg['tar_files']['net.py'], 'copy')\nfound = os.path.exists('copy')"
    assert await host.hostile.run(copying) == {"found": True}


async def test_files_of_a_script_do_not_run_in_the_next_worker_before_it_is_confined(host: Host) -> None:
    # Python and the loader of libraries look for these when they start.
    mark = host.folder / "escaped"
    code = f"""
    import site
    evil = "import os, pathlib; pathlib.Path({str(mark)!r}).touch(); pathlib.Path('seen').touch()"
    home = Path(os.environ["HOME"])
    folder = home / ".local/lib" / f"python{{sys.version_info[0]}}.{{sys.version_info[1]}}" / "site-packages"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evil.pth").write_text(evil + "\\n")
    for name in ("json", "sitecustomize", "usercustomize", "evaluator", "atserving", "msgspec"):
        (home / f"{{name}}.py").write_text(evil)
    os._exit(1)
    """
    async with connected(host.hostile.process) as connection:
        died = await ask(connection, request(code))
        assert died.error.message == "the net's process died"
    assert await host.hostile.run("found = os.path.exists('seen')") == {"found": False}
    assert not mark.exists()
