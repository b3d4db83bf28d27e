"""OpenTelemetry traces, off by default: where one request's time went, span by span.

::

    POST /v1/images/generations        requests.py   the gateway's layer around every request
      draw                             drawing.py    a decorator around the dispatcher
        picture                        pictures.py   one for each picture of the request
          queue encode cache denoise decode          as its worker measured them; steps as events

Spans wait in a bounded queue (export.py) and leave on a thread of their own: a receiver that is
slow or away costs spans, which are counted, and no request any time. Nothing here is imported
while traces are off, apart from their configuration.
"""
