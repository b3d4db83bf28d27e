"""Everything around the server: images, compose, Prometheus, Grafana, Kubernetes."""
