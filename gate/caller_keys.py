"""The callers that the original service's schemes name: their keys, and the peers whose word counts, from a file."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import msgspec
import structlog

from atserving.errors import StartError
from atserving.followed_files import FollowedFiles

log = structlog.get_logger()

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_Uid = Annotated[int, msgspec.Meta(ge=0, lt=10**18)]
_Group = Annotated[str, msgspec.Meta(pattern=r"^[!-+\--~]{1,100}\Z")]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pair of keys, and the caller that it stands for."""

    access_key: Annotated[str, msgspec.Meta(pattern=r"^[!-9;-~]{1,200}\Z")]
    secret_key: Annotated[str, msgspec.Meta(min_length=16)]
    uid: _Uid
    groups: tuple[_Group, ...] = ()


class _Stub(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    networks: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[Key] = []
    require_date: bool = False
    stub: _Stub = _Stub()


class CallerKeys:
    """The file of ``--caller-keys``, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises StartError."""
        self._path = path
        self._file = FollowedFiles(path)
        self._take(self._read())

    def key(self, access_key: str) -> Key | None:
        """Return the keys of a caller, or None if nobody has this one."""
        return self._keys.get(access_key)

    def takes_word_of(self, address: str, principal: str) -> bool:
        """Return whether a peer, by its address and the name in its certificate, may say who calls."""
        if principal and principal in self._peers:
            return True
        if not self._networks:
            return False
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(found, ipaddress.IPv6Address):
            found = found.ipv4_mapped or found
        return any(found in network for network in self._networks)

    def follow(self) -> None:
        """Read the file again if it has changed. One that is wrong changes nothing."""
        if not self._file.changed():
            return
        try:
            self._take(self._read())
            log.info("caller keys changed", count=len(self._keys))
        except StartError as error:
            log.error("caller keys unchanged", reason=str(error))

    def _take(self, found: tuple[_File, tuple[Network, ...]]) -> None:
        file, self._networks = found
        self._keys = {each.access_key: each for each in file.keys}
        self._peers = frozenset(file.stub.peers)
        self.require_date = file.require_date

    def _read(self) -> tuple[_File, tuple[Network, ...]]:
        try:
            file = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except OSError as error:
            raise StartError(f"can't read {self._path} for --caller-keys: {error.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StartError(f"{self._path} of --caller-keys: {error}") from None
        if len({each.access_key for each in file.keys}) < len(file.keys):
            raise StartError(f"{self._path} of --caller-keys: two callers have the same access_key")
        return file, tuple(self._network(each) for each in file.stub.networks)

    def _network(self, text: str) -> Network:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise StartError(f"{self._path} of --caller-keys: stub.networks: {error}") from None
        if not network.is_private:
            raise StartError(f"{self._path} of --caller-keys: stub.networks: {text} should be a private network")
        return network
