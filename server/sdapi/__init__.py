"""The interface of Automatic1111's web UI: its words in ours, and the state its clients expect.

What each field does here is said at the field, in :mod:`server.schemas.sdapi`: it is honoured,
accepted without effect, or refused where it would change the picture in a way that is not served.
"""
