"""Request and reply bodies, one module for each interface. Requests refuse unknown fields."""
