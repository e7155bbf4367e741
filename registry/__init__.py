"""The registry: mirrors etcd for gates and evaluators, and serves the API for publishing releases."""
