"""Loupe: the judge of tintype's pictures. See ``README.md`` beside this file.

    from models.loupe import Loupe
    loupe = Loupe.load("models/loupe")
    loupe.score(picture, "a dog next to an umbrella")   # cosine, -1 to 1
    loupe.attributes(picture).objects                    # ("dog", "umbrella")
    loupe.features(pictures)                             # for the Fréchet distance

It is used to measure and never to choose: no checkpoint, prompt or seed was selected with it.
"""

from models.loupe.reader import Attributes, Loupe

__all__ = ["Attributes", "Loupe"]
