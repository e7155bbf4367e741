"""The command line: what the services' flags share, and the `atserving` command."""
