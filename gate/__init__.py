"""The gate: routes each request to a ready instance of the right version. Stateless; any number run in parallel."""
