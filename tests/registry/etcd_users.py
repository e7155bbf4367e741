"""Turn authentication on in an etcd, as an operator does."""

from __future__ import annotations

from atserving.config import PREFIX
from registry.etcd import User
from tests.processes import Etcd

USER = User("registry", "correct horse")
"""A user who may read and write below the prefix of the config."""


def enable_rights(etcd: Etcd) -> None:
    """Create USER and require authentication. ``etcd.ctl`` is root from then on."""
    etcd.ctl("user", "add", "root:root")
    etcd.ctl("user", "grant-role", "root", "root")
    etcd.ctl("user", "add", f"{USER.name}:{USER.password}")
    etcd.ctl("role", "add", "serving")
    etcd.ctl("role", "grant-permission", "serving", "--prefix=true", "readwrite", PREFIX)
    etcd.ctl("user", "grant-role", USER.name, "serving")
    etcd.ctl("auth", "enable")
    etcd.ctl_flags = ["--user", "root:root"]
