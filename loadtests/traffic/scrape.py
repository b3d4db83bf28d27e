"""Reads the server's own metrics beside the load, so that a report can say why it was slow."""

from __future__ import annotations

import json
import time
from pathlib import Path

import gevent
import gevent.event
import requests
from prometheus_client.parser import text_string_to_metric_families


class Scraper:
    """Writes one JSON line of ``darkroom_*`` samples every ``every_s`` seconds until stopped."""

    def __init__(self, base: str, headers: dict[str, str], path: Path, *, every_s: float) -> None:
        self._url = f"{base}/metrics"
        self._headers = headers
        self._path = path
        self._every_s = every_s
        self._stopped = gevent.event.Event()

    def run(self) -> None:
        """Scrape until :meth:`stop`; a scrape that fails is a gap."""
        began_s = time.perf_counter()
        with self._path.open("w") as log:
            while True:
                samples = self._scrape()
                if samples is not None:
                    at_s = time.perf_counter() - began_s
                    log.write(json.dumps({"at_s": at_s, "samples": samples}) + "\n")
                    log.flush()
                if self._stopped.wait(self._every_s):
                    return

    def stop(self) -> None:
        """End :meth:`run` after its next scrape."""
        self._stopped.set()

    def _scrape(self) -> dict[str, float] | None:
        try:
            response = requests.get(self._url, headers=self._headers, timeout=4)
            response.raise_for_status()
        except requests.RequestException:
            return None
        return sum_samples(response.text)


def sum_samples(text: str) -> dict[str, float]:
    """Samples by name, summed over labels, but for ``le``: enough for rates and quantiles."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("darkroom_"):
            continue
        for sample in family.samples:
            edge = sample.labels.get("le")
            name = sample.name if edge is None else f"{sample.name}|{edge}"
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums
