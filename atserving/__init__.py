"""What every service of the mesh shares, and nothing else."""

__version__ = "0.1.0"
