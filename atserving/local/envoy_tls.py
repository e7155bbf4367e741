"""Makes ``envoy/envoy-tls.yaml`` of ``envoy/envoy.yaml``: the same edge, with mutual TLS to gates and registries.

python -m atserving.local.envoy_tls
"""

from __future__ import annotations

from atserving.local.examples import ROOT

SOURCE, TARGET = ROOT / "envoy" / "envoy.yaml", ROOT / "envoy" / "envoy-tls.yaml"

_HEAD = """\
# Made of envoy.yaml by `make envoy`: Envoy speaks TLS with gates and registries, by the files that tls-*.yaml name.
#
"""
_CLUSTER = "    - name: {name}\n      type: STRICT_DNS\n"
_SOCKET = """\
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
          common_tls_context:
            alpn_protocols: [h2]
            tls_params: {{tls_minimum_protocol_version: TLSv1_2, tls_maximum_protocol_version: TLSv1_3}}
            tls_certificate_sds_secret_configs:
              - name: own
                sds_config: {{path_config_source: {{path: /etc/envoy/tls-own.yaml}}, resource_api_version: V3}}
            validation_context_sds_secret_config:
              name: {name}
              sds_config: {{path_config_source: {{path: /etc/envoy/tls-{name}.yaml}}, resource_api_version: V3}}
"""


def with_tls(bootstrap: str) -> str:
    """Return the text of the bootstrap, with TLS."""
    for name in ("gate", "registry"):
        cluster = _CLUSTER.format(name=name)
        before, found, after = bootstrap.partition(cluster)
        assert found, f"{SOURCE} has no cluster {name}"
        bootstrap = before + cluster + _SOCKET.format(name=name) + after
    return _HEAD + bootstrap


if __name__ == "__main__":
    TARGET.write_text(with_tls(SOURCE.read_text()))
