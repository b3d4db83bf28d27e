"""The configuration and the smoke test of docker-compose.yml."""
