"""What breaks in the mesh: processes, the config, callers and nets."""
