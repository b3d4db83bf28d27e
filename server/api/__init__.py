"""The HTTP interfaces: one module each, all built by ``routes(services)``."""
