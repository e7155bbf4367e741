"""The front process of an instance: takes calls over gRPC, holds capacity for them, and supervises the worker."""
