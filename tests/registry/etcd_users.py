"""Turn authentication on in an etcd, as an operator does."""

from __future__ import annotations

from atserving.config import PREFIX
from registry.etcd import User
from tests.processes import Etcd

USER = User("registry", "correct horse")
"""A user who may read and write below the prefix of the config."""


def enable_rights(etcd: Etcd, user: User = USER) -> None:
    """Create a user and require authentication. ``etcd.ctl`` is root from then on."""
    etcd.ctl("user", "add", "root:root")
    etcd.ctl("user", "grant-role", "root", "root")
    etcd.ctl("user", "add", f"{user.name}:{user.password}")
    etcd.ctl("role", "add", "serving")
    etcd.ctl("role", "grant-permission", "serving", "--prefix=true", "readwrite", PREFIX)
    etcd.ctl("user", "grant-role", user.name, "serving")
    etcd.ctl("auth", "enable")
    etcd.ctl_flags = ["--user", "root:root"]
