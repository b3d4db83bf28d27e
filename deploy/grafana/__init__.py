"""Dashboards as code, their check against a real Prometheus, and what provisions Grafana."""
