"""A random mixed batch on a real model: does anybody's picture depend on who shared its ticks?"""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from engine.loop import LoopConfig, StepLoop
from engine.model import Model
from engine.prepare import build, encode, resolve
from engine.scheduler import TickPolicy
from engine.trajectory import Trajectory
from engine.types import GenerateRequest
from tests.fake_clock import FakeClock
from tests.unit.fakes import FixedTimes, Owner, owner_of

SOLVERS = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
PROMPTS = ("a red umbrella", "a dog", "two cats of the house", "")
TRAJECTORIES = 8


def worst_difference(model: Model, seed: int) -> float:
    """The largest relative difference between a final latent in company and the same alone.

    Solvers, steps, guidance and prompts are drawn at random, trajectories join and leave between
    ticks, and one of them is ten times as loud as the others.
    """
    chance = random.Random(seed)
    choices = [_request(chance, i) for i in range(TRAJECTORIES)]
    loud = chance.randrange(TRAJECTORIES)

    def made() -> list[Trajectory]:
        return [
            _trajectory(model, request, amplitude=10.0 if i == loud else 1.0)
            for i, request in enumerate(choices)
        ]

    singles = []
    for item in made():
        loop = _loop(model)
        loop.submit(item)
        while loop.tick():
            pass
        singles.append(_latent(item))
    loop, items, largest = _loop(model), made(), 0
    waiting = list(items)
    while waiting or loop.live:
        if waiting and chance.random() < 0.5:
            loop.submit(waiting.pop())
        loop.tick()
        largest = max(largest, loop.live)
    assert largest > 2, "nobody had company"
    return max(
        float(torch.linalg.norm(_latent(item) - single) / torch.linalg.norm(single))
        for item, single in zip(items, singles, strict=True)
    )


def _request(chance: random.Random, seed: int) -> GenerateRequest:
    return GenerateRequest(
        prompt=chance.choice(PROMPTS),
        steps=chance.randint(2, 8),
        solver=chance.choice(SOLVERS),
        guidance=chance.choice([1.0, 2.0, 7.5]),
        guidance_interval=chance.choice([(0.0, 1.0), (0.2, 0.8)]),
        seed=seed,
    )


def _trajectory(model: Model, request: GenerateRequest, *, amplitude: float) -> Trajectory:
    resolved = resolve(request, model)
    item = build(
        resolved,
        encode(resolved, model),
        model,
        request_id=f"t{request.seed}",
        listener=Owner(),
    )
    return replace(item, start=amplitude * item.start)


def _latent(item: Trajectory) -> torch.Tensor:
    owner = owner_of(item)
    assert owner.latent is not None, owner.error
    assert torch.isfinite(owner.latent).all()
    return owner.latent


def _loop(model: Model) -> StepLoop:
    return StepLoop(
        {model.digest: model.denoiser},
        TickPolicy(FixedTimes(rows=7)),
        clock=FakeClock(),
        config=LoopConfig(max_live=TRAJECTORIES, max_resident_bytes=2**30),
    )
