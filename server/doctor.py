"""What this machine can run, found out by trying, and what to install for the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from engine.compile.tensorrt_flavours import FLAVOURS, Flavour
from engine.errors import DarkroomError
from server.settings import Settings, served_config

State = Literal["ok", "absent", "broken"]
_REDIS_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One part of the machine. ``absent`` is a choice; ``broken`` keeps Darkroom from working."""

    part: str
    state: State
    detail: str
    advice: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Look at everything that a plan may need."""
    return [
        _python(),
        _cpu(settings),
        *_packages(),
        _checked("onnxruntime", _onnxruntime),
        _checked("cuda", _cuda),
        *(_checked(flavour.name, partial(_tensorrt, flavour)) for flavour in FLAVOURS.values()),
        _redis(settings),
        _home(settings),
    ]


def _python() -> Finding:
    version = platform.python_version()
    return Finding("python", "ok", f"{version} on {platform.machine()}")


def _cpu(settings: Settings) -> Finding:
    flags = _cpu_flags()
    int8 = "int8 at full width (VNNI)"
    if not flags & {"avx512_vnni", "avx_vnni", "asimddp"}:
        # Without VNNI, u8 x s8 products saturate at 16 bits: weights must keep a bit free.
        int8 = "int8 with 7-bit weights (no VNNI)"
    detail = f"{settings.threads} of {os.cpu_count()} cores, {int8}"
    return Finding("cpu", "ok", detail, "DARKROOM_THREADS sets the number of threads")


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    return {
        flag
        for key, _, value in lines
        if key.strip() in ("flags", "Features")
        for flag in value.split()
    }


def _packages() -> Iterator[Finding]:
    for name, extra in (("torch", "engine"), ("transformers", "engine"), ("diffusers", "compile")):
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "broken", "not installed", f"pip install 'darkroom[{extra}]'")


def _checked(part: str, look: Callable[[], Finding]) -> Finding:
    """A backend that fails to import or start is a finding, whatever it raises."""
    try:
        return look()
    except Exception as error:
        return Finding(part, "absent", f"{type(error).__name__}: {error}".splitlines()[0])


def _onnxruntime() -> Finding:
    import onnxruntime

    providers = [
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    ]
    detail = f"{onnxruntime.__version__}: {', '.join(providers)}"
    advice = "" if "CUDA" in providers else "for GPUs: pip install onnxruntime-gpu in its place"
    if "Tensorrt" in providers:
        advice = "provider: tensorrt (of a model; --provider) prefers it on device cuda"
    return Finding("onnxruntime", "ok", detail, advice)


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("cuda", "absent", "no usable GPU", "install a CUDA build of torch")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    advice = "DARKROOM_DEVICE=cuda draws there (workers.device, generate --device)"
    return Finding("cuda", "ok", ", ".join(names), advice)


def _tensorrt(flavour: Flavour) -> Finding:
    covered = "; ".join(f"{number} ({gpus})" for number, gpus in flavour.gpus.items())
    where = "builds for any of them here" if flavour.ahead_of_time else "builds on the GPU itself"
    about = f"compute capability {covered}; {where}"
    for module in flavour.modules:
        try:
            version = importlib.import_module(module).__version__
        except ImportError:
            continue
        return Finding(flavour.name, "ok", f"{version}: {about}")
    return Finding(flavour.name, "absent", f"not installed: {about}", flavour.install)


def _redis(settings: Settings) -> Finding:
    """A server that is configured and cannot be used is broken: jobs would be refused."""
    try:
        config = served_config(settings.config).redis
    except DarkroomError as error:
        return Finding("redis", "broken", f"the configuration: {error}", "darkroom config check")
    if config.url is None:
        detail = "not configured: jobs and the noise cache are in memory"
        advice = "DARKROOM_REDIS_URL keeps jobs over a restart and shares the cache among workers"
        return Finding("redis", "absent", detail, advice)
    try:
        from cache.connection import MIN_VERSION, RedisSettings, check_version
    except ImportError:
        return Finding("redis", "broken", "no client", "pip install 'darkroom[serve]'")
    needed = ".".join(map(str, MIN_VERSION))
    try:
        with RedisSettings(url=config.url).client(_REDIS_TIMEOUT_S) as client:
            check_version(client)
            version = client.info("server")["redis_version"]
    except DarkroomError as error:
        return Finding("redis", "broken", str(error), f"Redis {needed} or newer, or none at all")
    except Exception as error:  # refused, timed out, wrong password; none of it names the password
        detail = f"{_address(config.url)} does not answer: {type(error).__name__}"
        return Finding("redis", "broken", detail, "start it, or correct redis.url")
    return Finding("redis", "ok", f"{version} at {_address(config.url)}")


def _address(url: str) -> str:
    """Without user and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _home(settings: Settings) -> Finding:
    probe = settings.home / ".writable"
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return Finding("home", "broken", f"{settings.home}: {error.strerror}", "set DARKROOM_HOME")
    return Finding("home", "ok", str(settings.home), "DARKROOM_HOME moves it")
