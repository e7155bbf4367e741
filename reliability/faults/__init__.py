"""The faults of the mesh: processes, the config, callers and nets."""
