"""Programs that break or attack a mesh under load, and count what its callers lose: ``make chaos``, ``make attack``."""
