"""One release of one app, served: loading, the net, batching, the gRPC server."""
