"""The whole mesh on one machine: its processes, their command lines, and the releases it serves."""
