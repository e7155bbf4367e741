"""The mesh beside other servers that run the same net: ``python -m bench.peers``."""
