"""Scrapes of a gate's metrics, as a Prometheus reads them."""

from __future__ import annotations

import asyncio
import urllib.request

from prometheus_client.samples import Sample

from tests.metric_text import families

PREFIX = "atserving_gate_"


class Scrape:
    """The samples of one page."""

    def __init__(self, text: str, content_type: str) -> None:
        self.samples: list[Sample] = [sample for family in families(text, content_type) for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with these labels, among others; 0 without any."""
        found = self.labelled(name, **labels)
        return sum(sample.value for sample in found)

    def labelled(self, name: str, **labels: str) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
        ]

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Return the values above 0, by a label."""
        return {sample.labels[label]: sample.value for sample in self.labelled(name, **labels) if sample.value}


async def scrape(port: int, accept: str = "") -> Scrape:
    """Read the page of a gate's process."""

    def get() -> Scrape:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"accept": accept})
        with urllib.request.urlopen(request, timeout=60) as page:
            return Scrape(page.read().decode(), page.headers["content-type"])

    return await asyncio.to_thread(get)
