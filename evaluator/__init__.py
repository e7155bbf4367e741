"""The evaluator serves one release of one app. It runs as two processes: the front (``serving``) and the worker."""

import os

# Disable onnxruntime's telemetry. It reads this variable on import, in both processes.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
