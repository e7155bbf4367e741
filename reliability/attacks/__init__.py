"""What callers do to the mesh on purpose."""
