"""Pure ASGI layers around the application, outermost first in :mod:`server.gateway`."""
