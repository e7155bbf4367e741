"""Answers Envoy's question who a caller is, for the original service's schemes (Envoy's filter `ext_authz`)."""

from __future__ import annotations

import hmac
import time
from calendar import timegm
from collections.abc import Mapping
from urllib.parse import parse_qsl

import structlog
from grpc import StatusCode

from atserving.errors import Unauthenticated
from atserving.grpc_call import Call, GrpcError, parsed
from atserving.grpc_server import Server
from atserving.telemetry import RequestLog, trace_context, trace_id
from atserving.v1 import authorization_pb2 as messages
from gate.caller_keys import CallerKeys
from gate.callers import GROUPS, QINIU, UID, Callers
from gate.qiniu_sign import sign
from gate.request_counts import RequestCounts, refusal_of

log = structlog.get_logger()

PATH = "/envoy.service.auth.v3.Authorization/Check"

_DATE = "x-qiniu-date"
_DATE_FORMAT = "%Y%m%dT%H%M%SZ"
_MOST_OFF_S = 15 * 60
_HeaderValueOption = messages.HeaderValueOption
_OVERWRITE = _HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
# One text for a wrong signature and an unknown key: it tells nobody which keys exist.
_WRONG = "the signature does not match, or the access key is unknown"


class _Refused(Unauthenticated):
    """The credentials are wrong; ``why`` is for the log."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why or message


class Authorization:
    """Tells callers apart by Qiniu's signatures, and by the word of peers that may say who calls."""

    def __init__(self, keys: CallerKeys, callers: Callers, counts: RequestCounts) -> None:
        """``callers`` knows whether it is Envoy that asks. ``counts`` has the requests that Envoy refuses for it."""
        self._keys = keys
        self._counts = counts
        self._callers = callers
        self._lines = RequestLog("gate")

    def register(self, server: Server) -> None:
        """Answer the service's calls on a server."""
        server.unary(PATH, self.check)

    def check(self, call: Call) -> None:
        if not self._callers.is_edge(call.headers):
            reason = "only Envoy may ask who a caller is, and this one shows no key of --edge-key"
            self._rejected({}, Unauthenticated.status, reason)
            call.abort(StatusCode.UNAUTHENTICATED, reason)
            return
        try:
            attributes = parsed(messages.CheckRequest(), call.take_message()).attributes
        except GrpcError as error:
            call.abort(error.status, str(error))
            return
        self._keys.follow()
        try:
            uid, groups = self._caller(attributes)
            response = _admitted(uid, groups)
        except _Refused as refusal:
            self._rejected(attributes.request.http.headers, refusal.status, refusal.why)
            self._counts.refused("", refusal.status, refusal_of(refusal))
            response = _denied(refusal)
        call.finish(response.SerializeToString())

    def _rejected(self, headers: Mapping[str, str], code: int, reason: str) -> None:
        reqid = headers.get("x-reqid", "")
        if self._lines.wants(reqid, code, 0.0):
            traceparent = trace_context(headers.get("traceparent"))
            fields = {
                "reqid": reqid,
                "code": code,
                "reason": reason,
                "traceparent": traceparent,
                "trace_id": trace_id(traceparent),
            }
            self._lines.write("info", "request rejected", fields)

    def _caller(self, attributes: messages.AttributeContext) -> tuple[int, tuple[str, ...]]:
        """Return the uid and the groups of a caller. Raises _Refused."""
        scheme, _, shown = attributes.request.http.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "qiniu":
            return self._signed(attributes.request.http, shown.strip())
        if scheme.lower() == "qiniustub":
            return self._stated(attributes.source, shown.strip()), ()
        raise _Refused("the authorization should be Qiniu <access key>:<signature>")

    def _signed(self, http: messages.AttributeContext.HttpRequest, shown: str) -> tuple[int, tuple[str, ...]]:
        access_key, _, signature = shown.partition(":")
        key = self._keys.key(access_key)
        if key is None:
            raise _Refused(_WRONG, "the access key is unknown")
        expected = sign(key.secret_key, http.method, http.path, http.host, http.headers, http.raw_body)
        if not hmac.compare_digest(expected, signature.encode()):
            raise _Refused(_WRONG, "the signature does not match")
        date = http.headers.get(_DATE)
        if date is None:
            if self._keys.require_date:
                raise _Refused("the request has no X-Qiniu-Date")
        elif not _is_now(date):
            raise _Refused("X-Qiniu-Date is malformed, or more than 15 minutes off")
        return key.uid, key.groups

    def _stated(self, peer: messages.AttributeContext.Peer, shown: str) -> int:
        if not self._keys.takes_word_of(peer.address.socket_address.address, peer.principal):
            raise _Refused("QiniuStub is not accepted from this peer")
        uids = [value for name, value in parse_qsl(shown, keep_blank_values=True) if name == "uid"]
        if len(uids) != 1 or not (uids[0].isascii() and uids[0].isdigit() and len(uids[0]) < 19):
            raise _Refused("QiniuStub should have one uid, a number")
        return int(uids[0])


def _is_now(date: str) -> bool:
    try:
        at_s = timegm(time.strptime(date, _DATE_FORMAT))
    except ValueError:
        return False
    return abs(time.time() - at_s) <= _MOST_OFF_S


def _admitted(uid: int, groups: tuple[str, ...]) -> messages.CheckResponse:
    known = {UID: str(uid)} | ({GROUPS: ",".join(groups)} if groups else {})
    # The credentials are for this edge alone. Nothing of another scheme's is mixed in.
    removed = ["authorization"] + ([] if groups else [GROUPS])
    ok = messages.OkHttpResponse(headers=[_header(*each) for each in known.items()], headers_to_remove=removed)
    return messages.CheckResponse(status=messages.Status(code=0), ok_response=ok)


def _denied(refusal: _Refused) -> messages.CheckResponse:
    denied = messages.DeniedHttpResponse(
        status=messages.HttpStatus(code=refusal.status),
        headers=[_header("www-authenticate", QINIU)],
        body=refusal.message,
    )
    code: int = StatusCode.UNAUTHENTICATED.value[0]
    return messages.CheckResponse(status=messages.Status(code=code), denied_response=denied)


def _header(key: str, value: str) -> messages.HeaderValueOption:
    return _HeaderValueOption(header=messages.HeaderValue(key=key, value=value), append_action=_OVERWRITE)
