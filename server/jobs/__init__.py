"""Jobs: pictures that are drawn while nobody holds a connection open for them.

``records`` are the nouns, ``store`` the seam (``memory``, ``redis``), ``runner`` takes jobs to the
dispatcher and keeps them alive across gateways, ``webhooks`` tells others when they are done.
"""
