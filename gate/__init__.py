"""The gate: routes every request to a ready instance of the right version. Stateless; any number run side by side."""
