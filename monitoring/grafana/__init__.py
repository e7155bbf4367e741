"""Grafana's boards as code: `make boards` writes them to monitoring/boards/."""
