"""A real registry, with its etcd, for the tests of running evaluators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import Registry, running_registry


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that all tests share; each uses an app of its own."""
    with running_registry(tmp_path_factory.mktemp("registry"), "--lease-ttl", "3s") as registry:
        yield registry
