"""One release of one app, served: loading, the net, batching, the gRPC server."""

import os

# Otherwise onnxruntime reports what it runs to its maker. It reads this when it is loaded, here and in the worker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
