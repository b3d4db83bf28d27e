"""Darkroom's command line and, over :mod:`engine` and :mod:`cache`, its HTTP service."""
