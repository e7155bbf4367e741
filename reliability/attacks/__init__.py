"""The attacks of callers on the mesh."""
