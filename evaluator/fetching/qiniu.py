"""The keys and buckets of an owner in Kodo, Qiniu's object storage, and the signature of a download."""

from __future__ import annotations

import base64
import hmac
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from yarl import URL

from atserving.errors import StartError


def checked_base(text: str) -> str:
    """Return the base URL of a host, without a slash at the end. Raises ValueError."""
    url = URL(text)
    if url.scheme not in ("http", "https") or not url.host or url.path_qs != "/" or url.user or url.fragment:
        raise ValueError("should be http(s)://host[:port]")
    _ = url.port  # yarl parses the port only when it is read
    return text.rstrip("/")


Base = Annotated[str, AfterValidator(checked_base)]
Secret = Annotated[SecretStr, Field(min_length=1)]


class QiniuConfig(BaseModel):
    """The file of ``--qiniu``: the keys of the app's owner, the buckets open to requests, and the download hosts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    access_key: Secret
    secret_key: Secret
    buckets: frozenset[str] = frozenset()
    """The buckets that requests may read. The keys open all buckets of the owner, so the default is none."""
    domains: dict[str, Base] = {}
    """The base URLs of downloads by bucket. The bucket service is asked for the others."""
    service: Base = "https://uc.qiniuapi.com"
    """The bucket service. With an http URL, downloads use http too."""


def read_config(path: Path) -> QiniuConfig:
    """Read the file of ``--qiniu``. Raises StartError, which names the wrong field but never a value."""
    try:
        return QiniuConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StartError(f"--qiniu {path}: can't be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise StartError(f"--qiniu {path}: {where}{first['msg']}") from None


def sign(url: str, config: QiniuConfig, expires: int) -> str:
    """Return the download URL of a private object: ``url``, which has no query, with Kodo's download token.

    The token is valid until ``expires``, in Unix seconds. It holds the access key and the HMAC-SHA1 of the URL, see
    https://developer.qiniu.com/kodo/1202/download-token.
    """
    unsigned = f"{url}?e={expires}"
    digest = hmac.digest(config.secret_key.get_secret_value().encode(), unsigned.encode(), "sha1")
    signature = base64.urlsafe_b64encode(digest).decode()
    return f"{unsigned}&token={config.access_key.get_secret_value()}:{signature}"
