"""Write the PrometheusRule of the base from the rules that compose's Prometheus reads.

python -m deploy.kubernetes.build            # writes deploy/kubernetes/base/prometheusrule.yaml
python -m deploy.kubernetes.build --check    # fails when it is out of step
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

RULES = Path(__file__).resolve().parents[1] / "prometheus" / "rules"
WRITTEN = Path(__file__).parent / "base" / "prometheusrule.yaml"
_HEAD = """\
# For the Prometheus operator. Written by `python -m deploy.kubernetes.build` from
# deploy/prometheus/rules: change the rules there.
"""


def main() -> None:
    """Write, or with ``--check`` compare."""
    text = render()
    if "--check" not in sys.argv:
        WRITTEN.write_text(text)
    elif not WRITTEN.exists() or WRITTEN.read_text() != text:
        sys.exit(f"out of step: {WRITTEN.name}; run python -m deploy.kubernetes.build")


def render() -> str:
    """The manifest, with the groups of all files of rules."""
    files = sorted(RULES.glob("*.yml"))
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "darkroom", "labels": {"app.kubernetes.io/name": "darkroom"}},
        "spec": {
            "groups": [
                group for file in files for group in yaml.safe_load(file.read_text())["groups"]
            ]
        },
    }
    return _HEAD + yaml.safe_dump(manifest, sort_keys=False, width=1000)


if __name__ == "__main__":
    main()
