"""Turns the ``qiniu://`` URI of an object in Kodo, Qiniu's object storage, into a signed download URL."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import quote

import aiohttp
import msgspec
from async_lru import alru_cache
from yarl import URL

from atserving.errors import InvalidArgument, ResourceUnreachable, ServingError
from atserving.uris import QiniuUri
from evaluator.fetching.addresses import AddressRefused
from evaluator.fetching.host_rules import HostRefused
from evaluator.fetching.qiniu import QiniuConfig, checked_base, sign
from evaluator.fetching.sessions import Sessions
from evaluator.fetching.statuses import is_refusal

_LOOKUP_S = 5.0
_LOOKUP_BYTES = 1 << 20
_CACHED_S = 3600.0
_CACHED_BUCKETS = 1024
# A URL is used at once. The rest allows for clocks that differ.
_SIGNED_S = 600


class _Hosts(msgspec.Struct):
    domains: list[str] = []


class _Region(msgspec.Struct):
    region: str
    io_src: _Hosts = msgspec.field(default_factory=_Hosts)


class _QueryResponse(msgspec.Struct):
    hosts: list[_Region]


class Buckets:
    """Finds the download hosts of the owner's buckets and signs downloads.

    Follows Qiniu's Go SDK (``storagev2/downloader``): ``GET /v4/query?ak=&bucket=`` at the bucket service returns the
    regions of a bucket, each with the domains of its origin, ``io_src``. A download is
    ``GET https://domain/key?e=&token=``. Concurrent requests for one bucket share a lookup. Results are cached for an
    hour, failures are not.
    """

    def __init__(self, config: QiniuConfig, sessions: Sessions) -> None:
        """``sessions`` decide which addresses may be connected to."""
        self.open = config.buckets
        """The buckets that requests may read."""
        self._config = config
        self._sessions = sessions
        self._regions = alru_cache(maxsize=_CACHED_BUCKETS, ttl=_CACHED_S)(self._look_up)

    async def url(self, uri: QiniuUri, label: str) -> URL:
        """Return the signed URL, which is a secret.

        Raises InvalidArgument and ResourceUnreachable, whose messages begin with ``label``.
        """
        try:
            base = self._config.domains.get(uri.bucket) or await self._base(uri)
        except ServingError as error:
            raise type(error)(f"{label}: {error.message}") from None
        return URL(sign(f"{base}/{quote(uri.key)}", self._config, int(time.time()) + _SIGNED_S), encoded=True)

    async def _base(self, uri: QiniuUri) -> str:
        regions = [region for region in await self._regions(uri.bucket) if region.region == uri.zone]
        if not regions:
            raise InvalidArgument("its bucket is not in that zone")
        domains = [domain for region in regions for domain in region.io_src.domains]
        if not domains:
            raise ResourceUnreachable("the bucket service names no domain to download from")
        domain = domains[0]
        try:
            return checked_base(domain if "://" in domain else f"{URL(self._config.service).scheme}://{domain}")
        except ValueError:
            raise ResourceUnreachable("the bucket service's answer can't be read") from None

    async def _look_up(self, bucket: str) -> list[_Region]:
        query = {"ak": self._config.access_key.get_secret_value(), "bucket": bucket}
        url = URL(self._config.service).with_path("/v4/query").with_query(query)
        try:
            async with (
                asyncio.timeout(_LOOKUP_S),
                self._sessions.of(url).get(url, allow_redirects=False) as response,
            ):
                if is_refusal(response.status):
                    raise InvalidArgument(f"the bucket service answered {response.status}")
                if response.status != 200:
                    raise ResourceUnreachable(f"the bucket service answered {response.status}")
                return msgspec.json.decode(await _body(response), type=_QueryResponse).hosts
        except TimeoutError:
            raise ResourceUnreachable(f"the bucket service did not answer within {_LOOKUP_S:g} s") from None
        except HostRefused:
            raise ResourceUnreachable("the bucket service is no host that this app may fetch from") from None
        except AddressRefused:
            raise ResourceUnreachable("the bucket service has no public address") from None
        except (aiohttp.ClientError, OSError):
            raise ResourceUnreachable("the bucket service could not be reached") from None
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise ResourceUnreachable("the bucket service's answer can't be read") from None

    async def close(self) -> None:
        """Cancel running lookups."""
        await self._regions.cache_close()


async def _body(response: aiohttp.ClientResponse) -> bytes:
    try:
        await response.content.readexactly(_LOOKUP_BYTES)
    except asyncio.IncompleteReadError as whole:
        return whole.partial
    raise ResourceUnreachable("the bucket service's answer is too long")
