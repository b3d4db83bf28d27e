"""Which embedding of a prompt tells best how close two scenes are.

::

    python -m loadtests.cache_embedding

Rank correlation (Spearman) between cosines and the distance of the scenes asked for, over all pairs
of prompts of the editing sessions: three for each thing that is in only one of both scenes' sets
(shared ones halve it), one for every other part that differs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from cache.embedding import DIMENSIONS, embed, unit
from engine.prepare import encode, resolve
from engine.types import GenerateRequest
from loadtests.common import conditions
from server.cache_wiring import opened_model
from server.settings import Settings

_PARTS = ("style", "background", "count", "relation", "size", "place")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tintype")
    options = parser.parse_args()
    settings = Settings.from_environment()
    sessions = json.loads((settings.models / "prompts/editing.json").read_text())
    steps = [step for session in sessions for step in session["steps"]]
    with opened_model(settings, options.model, "fp32") as model:
        contexts = []
        for step in steps:
            resolved = resolve(GenerateRequest(prompt=step["prompt"], guidance=1.0), model)
            contexts.append(encode(resolved, model).conditioning.context[0].numpy())
    apart = np.asarray([[_distance(a["scene"], b["scene"]) for b in steps] for a in steps])
    pairs = np.triu_indices(len(steps), 1)
    table = Table("embedding", "rank correlation", "one edit apart", "unrelated, 99 %")
    for name, vectors in {
        "mean over tokens": [unit(context.mean(axis=0)) for context in contexts],
        "last token": [unit(context[-1]) for context in contexts],
        "whole context": [unit(context.reshape(-1)) for context in contexts],
        f"whole context, sketched to {DIMENSIONS}": [embed(context) for context in contexts],
    }.items():
        cosines = (stacked := np.stack(vectors)) @ stacked.T
        near, far = cosines[pairs][apart[pairs] == 1], cosines[pairs][apart[pairs] >= 4]
        table.add_row(
            name,
            f"{-_spearman(cosines[pairs], apart[pairs]):.3f}",
            f"{near.mean():.3f}",
            f"{np.quantile(far, 0.99):.3f}",
        )
    Console(width=120).print(table)
    print(conditions(options))


def _distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    things, others = set(first["objects"]), set(second["objects"])
    if first["objects"] == second["objects"]:
        subject = 0.0
    else:
        subject = 3.0 * (1.0 - len(things & others) / 2.0)
    return subject + float(sum(bool(first[part] != second[part]) for part in _PARTS))


def _spearman(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> float:
    one, other = (np.argsort(np.argsort(values)).astype(np.float64) for values in (first, second))
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


if __name__ == "__main__":
    main()
