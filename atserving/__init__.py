"""What every service of the mesh shares, and nothing else."""

import os

# gRPC's core writes lines of its own to standard error for what its callers are told anyway. It reads this on import.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__version__ = "0.1.0"
