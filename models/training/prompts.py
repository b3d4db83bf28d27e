"""The benchmark prompts, fixed before the final training run: ``python -m models.training.prompts``
writes ``models/prompts``.

- ``seen.json``: every concept in plain words, then every concept with a style and a background;
  each composition is one that training may contain.
- ``unseen.json``: compositions of the hidden split: pairs, counts, and backgrounds that were
  never trained on together.
- ``editing.json``: sessions in which a user changes one thing at a time, for the noise cache and
  for priorities.

Every entry holds the prompt, the seed to draw with, and the scene that a right picture shows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from models.training import data
from models.training.captions import article, countable, plural


def canonical(scene: data.Scene) -> str:
    """The plainest phrasing of a scene: "two cats on a blue background, flat style"."""
    first = scene.objects[0]
    if len(scene.objects) == 2:
        text = f"{article(first)} {scene.relation} {article(scene.objects[1])}"
    elif scene.count > 1:
        text = f"{({2: 'two', 3: 'three'})[scene.count]} {plural(first)}"
    elif scene.size == "small":
        where = {"centre": "in the centre", "left": "on the left", "right": "on the right"}.get(
            scene.place, f"at the {scene.place}"
        )
        text = f"{'small' if article(first) == first else 'a small'} {first} {where}"
    else:
        text = article(first)
    if scene.background != "white":
        text += f" on {article(scene.background + ' background')}"
    if scene.style != "default":
        text += f", {scene.style} style"
    return text


def entry(scene: data.Scene, seed: int) -> dict[str, Any]:
    """One line of a prompt file."""
    return {"prompt": canonical(scene), "seed": seed, "scene": scene.as_dict()}


def seen(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Every concept plain, and every concept with a random style and background that are not
    hidden.
    """
    scenes = [data.Scene(objects=(concept.name,)) for concept in data.concepts()]
    for concept in data.concepts():
        while True:
            scene = data.Scene(
                objects=(concept.name,),
                style=str(rng.choice(list(data.BASE_STYLES))),
                background=str(rng.choice(list(data.BACKGROUNDS))),
            )
            if not data.is_hidden(scene):
                break
        scenes.append(scene)
    return [entry(scene, 1000 + index) for index, scene in enumerate(scenes)]


def unseen(rng: np.random.Generator, each: int = 100) -> list[dict[str, Any]]:
    """Hidden compositions: ``each`` pairs, counts, and coloured backgrounds."""
    wanted = {"pair": each, "count": each, "background": each}
    scenes = []
    while any(wanted.values()):
        scene = replace(data.sample_scene(rng, hidden=True), seed=0)
        if len(scene.objects) == 2:
            kind, plain = "pair", replace(scene, background="white", style="default")
        elif scene.count > 1:
            kind, plain = "count", replace(scene, background="white", style="default")
        else:
            kind, plain = "background", replace(scene, size="normal", place="centre")
        if rng.random() < 0.5 and data.is_hidden(plain):
            scene = plain
        if kind == "background" and scene.size == "small":
            continue
        if wanted[kind]:
            wanted[kind] -= 1
            scenes.append(scene)
    return [entry(scene, 5000 + index) for index, scene in enumerate(scenes)]


def editing(rng: np.random.Generator, sessions: int = 40) -> list[dict[str, Any]]:
    """Sessions of four or five prompts that share a seed: a thing, then a background, a number or a
    neighbour, then a style.
    """
    names = [concept.name for concept in data.concepts()]
    result = []
    for index in range(sessions):
        first, second = (str(name) for name in rng.choice(names, size=2, replace=False))
        scene = data.Scene(objects=(first,))
        colours = [
            str(c)
            for c in rng.choice(
                [b for b in data.BACKGROUNDS if b != "white"], size=2, replace=False
            )
        ]
        steps = [
            scene,
            replace(scene, background=colours[0]),
            replace(scene, background=colours[1]),
        ]
        if index % 2 and countable(first):
            steps.append(replace(steps[-1], count=2))
        else:
            steps.append(replace(steps[-1], objects=(first, second), relation="next to"))
        steps.append(replace(steps[-1], style="flat" if index % 3 else "glossy"))
        result.append(
            {
                "session": index,
                "seed": 9000 + index,
                "steps": [entry(s, 9000 + index) for s in steps],
            }
        )
    return result


def write(folder: Path) -> None:
    """Write the three files; the same in every run."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"seen": seen, "unseen": unseen, "editing": editing}
    for number, (name, make) in enumerate(sets.items()):
        lines = ",\n".join(json.dumps(item) for item in make(np.random.default_rng(100 + number)))
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "prompts")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
