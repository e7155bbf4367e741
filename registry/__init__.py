"""The registry: mirrors etcd for gates and evaluators, and is the API through which releases are published."""
