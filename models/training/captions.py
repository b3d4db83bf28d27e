"""Captions: the many ways to say what is in a scene.

Captions name the subject always; the other parts only as a person would: a white background and the
default style usually go unsaid, so that a prompt which does not mention them gets them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from models.training.icons import concept_index, concepts

if TYPE_CHECKING:
    from models.training.data import Scene

_PLURAL = """
grapes, cherries, blueberries, pancakes, french fries, fries, socks, jeans, trousers, headphones,
scissors, maracas, sunglasses, paw prints, crossed swords, swords, books
"""
_MASS = """
bread, corn, broccoli, garlic, cheese, bacon, popcorn, ramen, sushi, dna, fire, lightning, meat,
milk, coffee, beer, love, poop, statue of liberty, cherry blossom
"""

PLURAL = frozenset(name.strip() for name in _PLURAL.split(","))
"""Names that are plural already: no article, and never counted."""

MASS = frozenset(name.strip() for name in _MASS.split(","))
"""Names that take no number."""

_IRREGULAR = {
    "mouse": "mice",
    "wolf": "wolves",
    "leaf": "leaves",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "knife": "knives",
}
_STYLE_WORDS = {
    "default": "noto",
    "flat": "flat",
    "glossy": "glossy",
    "twemoji": "twemoji",
    "silhouette": "silhouette",
}
_NUMBERS = {2: ("two", "2"), 3: ("three", "3")}
_PREFIXES = ("a picture of", "an image of", "an icon of", "a drawing of", "an emoji of")
_PLACE_WORDS = {
    "centre": ("in the centre", "in the middle", "in the center"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "on top", "in the upper part"),
    "bottom": ("at the bottom", "at the lower edge", "in the lower part"),
}

ONE_OF_MANY = 0.1
"""Share of single large things that are called "one of the buckets".

Where the split hides two and three of a concept, its plural would otherwise be a word never read
in training, and a hidden composition must be one of known parts.
"""


def countable(name: str) -> bool:
    """Whether "two NAMEs" can be said."""
    return name not in PLURAL and name not in MASS


def plural(name: str) -> str:
    """The plural of a countable name: "cup of coffee" becomes "cups of coffee"."""
    head, of, rest = name.partition(" of ")
    *front, noun = head.split(" ")
    if noun in _IRREGULAR:
        many = _IRREGULAR[noun]
    elif noun.endswith(("s", "x", "ch", "sh", "tomato")):
        many = noun + "es"
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        many = noun[:-1] + "ies"
    else:
        many = noun + "s"
    return " ".join([*front, many]) + of + rest


def article(name: str) -> str:
    """The name with "a" or "an" where it takes one."""
    if name in PLURAL or name in MASS:
        return name
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "ufo", "eu"))
    return f"{'an' if vowel else 'a'} {name}"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _name(rng: np.random.Generator, concept: str) -> str:
    synonyms = concepts()[concept_index()[concept]].synonyms
    return _pick(rng, synonyms) if synonyms and rng.random() < 0.15 else concept


def _subject(scene: Scene, rng: np.random.Generator) -> str:
    first = _name(rng, scene.objects[0])
    if len(scene.objects) == 2:
        second = _name(rng, scene.objects[1])
        bare = rng.random() < 0.15
        a, b = (first, second) if bare else (article(first), article(second))
        if scene.relation == "above":
            return _pick(
                rng,
                (
                    f"{a} above {b}",
                    f"{a} above {b}",
                    f"{a} over {b}",
                    f"{b} below {a}",
                    f"{b} under {a}",
                ),
            )
        beside = f"{a} next to {b}"
        return _pick(
            rng,
            (
                beside,
                beside,
                f"{a} and {b}",
                f"{a} beside {b}",
                f"{a} left of {b}",
                f"{b} to the right of {a}",
            ),
        )
    if scene.count > 1:
        return f"{_pick(rng, _NUMBERS[scene.count])} {plural(first)}"
    if scene.size == "small":
        sized = f"{_pick(rng, ('small', 'small', 'tiny', 'little'))} {first}"
        sized = article(sized) if first not in PLURAL and first not in MASS else sized
        if scene.place == "centre" and rng.random() < 0.5:
            return sized
        return f"{sized} {_pick(rng, _PLACE_WORDS[scene.place])}"
    if rng.random() < 0.06:
        big = f"{_pick(rng, ('big', 'large'))} {first}"
        return article(big) if first not in PLURAL and first not in MASS else big
    if rng.random() < ONE_OF_MANY and countable(first):
        return f"one of the {plural(first)}"
    return first if rng.random() < 0.4 else article(first)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One phrasing of a scene, in lower case."""
    text = _subject(scene, rng)
    if rng.random() < 0.2:
        text = f"{_pick(rng, _PREFIXES)} {text}"
    background = None
    if scene.background != "white" or rng.random() < 0.2:
        background = scene.background
        with_article = article(f"{background} background")
        where = rng.random()
        if where < 0.7:
            text += f" on {with_article}"
        elif where < 0.85:
            text += f", {background} background"
        else:
            text += f" with {with_article}"
    if scene.style != "default" or rng.random() < 0.1:
        word = _STYLE_WORDS[scene.style]
        where = rng.random()
        if where < 0.5:
            text += f", {word} style"
        elif where < 0.75:
            text += f" in {word} style"
        else:
            text = f"{word} style, {text}"
    return text
