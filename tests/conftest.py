"""Settings of all tests."""

import ctypes
import signal
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

_TESTS = Path(__file__).parent

# These start processes of the mesh, or convert whole nets. `make test-fast` leaves them out.
_SLOW = (
    "bench",
    "caffe/test_cli.py",
    "caffe/test_memory.py",
    "caffe/test_models.py",
    "e2e",
    "envoy",
    "evaluator/fetching/test_qiniu.py",
    "evaluator/images/test_hostile_images.py",
    "evaluator/nets/test_models.py",
    "evaluator/nets/test_served.py",
    "evaluator/sandbox",
    "evaluator/serving/test_log_level.py",
    "evaluator/serving/test_ops_http.py",
    "evaluator/serving/test_registration.py",
    "evaluator/serving/test_serving.py",
    "evaluator/serving/test_start.py",
    "evaluator/serving/test_supervisor.py",
    "evaluator/test_check.py",
    "evaluator/worker/test_script.py",
    "gate/test_logs.py",
    "gate/test_memory.py",
    "k8s",
    "local",
    "registry",
    "reliability/test_scenarios.py",
    "shared/test_commands.py",
    "shared/test_health.py",
)
# The longest files, which mostly wait. They begin first, so that none of them is alone at the end.
_FIRST = ("reliability/test_scenarios.py", "k8s/test_running.py", "e2e/test_release_content.py")
_FIRST_PATHS = [_TESTS / path for path in _FIRST]
_SLOW_PATHS = [_TESTS / path for path in _SLOW]
_PR_SET_PDEATHSIG = 1


def pytest_configure(config: pytest.Config) -> None:
    """Let the kernel kill a worker of xdist with its parent; the worker's own processes end with it."""
    if hasattr(config, "workerinput"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files and folders as slow, and begin with the longest files."""
    items.sort(key=lambda item: _FIRST_PATHS.index(item.path) if item.path in _FIRST_PATHS else len(_FIRST))
    for item in items:
        if any(item.path.is_relative_to(path) for path in _SLOW_PATHS):
            item.add_marker(pytest.mark.slow)


# A busy machine may take long over one example, or over generating it.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# structlog's default draws each exception with its local variables, which takes about 20 ms.
_renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[structlog.processors.add_log_level, _renderer])
