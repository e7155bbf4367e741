"""The code that all services of the mesh share."""

import os

# gRPC's core logs to standard error what its callers learn from the status anyway. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# setup.cfg and the Makefile read the version from this line.
__version__ = "0.1.0"
