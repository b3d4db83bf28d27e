"""The configuration of ``darkroom serve``: frozen, validated when it is constructed.

Everything has a default that suits one machine: ``darkroom serve`` without a file serves the
bundled model on loopback. Unknown keys are refused by name. :mod:`server.config_file` reads the
file; environment and flags are laid over it by :mod:`server.settings` and the command line.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cache.policy import DEFAULT_HALF_LIFE_S
from engine.errors import InvalidRequestError
from engine.types import Limits
from server.model_config import ModelConfig as ModelConfig
from server.model_config import Name as Name
from server.model_config import Positive, Section
from server.telemetry.config import TelemetryConfig


class HttpConfig(Section):
    """Where the gateway listens, and its bounds on what comes in."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    gateways: Annotated[int, Field(ge=1)] = 1
    """Processes that listen; those of one machine share the port."""
    max_head_bytes: Annotated[int, Field(gt=0)] = 32 << 10
    """Of a request's first line and headers together."""
    max_connections: Annotated[int, Field(gt=0)] = 1000
    """Open connections of one gateway, idle ones included."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 1 << 20
    """Of a JSON body."""
    max_upload_bytes: Annotated[int, Field(gt=0)] = 20 << 20
    """Of a multipart body with pictures, and of JSON bodies of the A1111 routes that hold some."""
    max_bodies_bytes: Annotated[int, Field(gt=0)] = 256 << 20
    """Of all bodies that one gateway holds at once; past it, requests wait their turn outside."""
    read_timeout_s: Positive = 15.0
    """For the whole head, and for the body beside what its length excuses: slow uploads end."""
    min_upload_bytes_per_s: Positive = 16 * 1024
    cors_origins: tuple[str, ...] = ()
    public_url: str | None = None
    """Prefix of signed links; by default what the client called."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class LimitsConfig(Section):
    """Bounds on one request."""

    max_steps: Annotated[int, Field(ge=1)] = 150
    max_side_px: Annotated[int, Field(ge=16)] = 2048
    max_area_px: Annotated[int, Field(ge=256)] = 2048 * 2048
    max_prompt_chars: Annotated[int, Field(ge=1)] = 4000
    max_guidance: Positive = 50.0
    max_pictures: Annotated[int, Field(ge=1)] = 10
    """Pictures of one request (OpenAI's ``n``)."""
    max_input_px: Annotated[int, Field(ge=256)] = 4096 * 4096
    """Pixels of an uploaded picture, checked before it is decoded."""
    request_timeout_s: Positive = 600.0
    """The deadline of a request that names none."""

    def engine_limits(self) -> Limits:
        """The part that the engine enforces."""
        return Limits(
            max_steps=self.max_steps,
            max_side_px=self.max_side_px,
            max_area_px=self.max_area_px,
            max_prompt_chars=self.max_prompt_chars,
            max_guidance=self.max_guidance,
        )


class WorkersConfig(Section):
    """Worker replicas."""

    replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """With it, workers scale between both on outstanding steps."""
    scale_down_after_s: Positive = 120.0
    """For so long a worker has to be one too many before it goes."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of the graphs of one worker; by default the cores, shared among the workers."""
    memory_budget_bytes: Annotated[int, Field(gt=0)] | None = None
    """Of open models in one worker; by default 60 % of the device's memory, which on CPU the
    workers share."""
    snapshot_every_s: Positive = 2.0
    """Compute that a worker's death may cost one picture: how often a full snapshot leaves it."""
    max_live: Annotated[int, Field(ge=1)] = 256
    device: Literal["cpu", "cuda"] = "cpu"

    def threads_of(self, cores: int) -> int:
        """CPU threads of one worker on a machine with so many cores."""
        return self.threads or max(1, cores // self.replicas)

    @model_validator(mode="after")
    def _ordered(self) -> WorkersConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("max_replicas is below replicas")
        return self


class AdmissionConfig(Section):
    """The queue: bounded in steps (UNet rows at native size), and in the seconds they take."""

    max_queued_steps: Positive = 20_000
    max_queued_steps_per_tenant: Positive | None = None
    """By default as many as in all."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 1000
    max_wait_s: Positive | None = 30.0
    """Of work before a request, by the measured rates, from which on it is refused; None bounds
    only the steps. With 30 s, wait and drawing mostly fit into the minute after which proxies and
    clients give up. It binds nobody who has said how long he waits, by a deadline or by making a
    job, and never the next in line."""
    aging_s: Positive = 30.0
    """A waiting request gains one level of priority for every so many seconds."""


class TenantConfig(Section):
    """A tenant: who pays, who shares fairly, whose pictures are kept apart."""

    id: Name
    key_hashes: tuple[str, ...] = ()
    """``darkroom keys new`` prints a key and its hash; only the hash is kept."""
    weight: Positive = 1.0
    requests_per_minute: Positive | None = None
    max_priority: Annotated[int, Field(ge=-10, le=10)] = 0
    operator: bool = False
    """May use operator routes: models, cache, log level."""


class AuthConfig(Section):
    """API keys. Off by default on loopback only; anywhere else it has to be said."""

    enabled: bool | None = None
    """By default on, except on loopback without tenants."""
    tenants: tuple[TenantConfig, ...] = ()


class JobsConfig(Section):
    """Jobs and their results: in memory, or in Redis, where they survive a gateway."""

    ttl_s: Positive = 3600.0
    max_jobs: Annotated[int, Field(ge=1)] = 10_000
    max_bytes: Annotated[int, Field(ge=1)] = 512 << 20
    """Of results; the oldest finished ones go first."""
    link_ttl_s: Positive = 3600.0
    """How long a signed link to a picture works."""
    webhook_hosts: tuple[str, ...] = ()
    """Hosts that a webhook may call; none by default. Private addresses need their own entry."""
    webhook_attempts: Annotated[int, Field(ge=1, le=20)] = 5


class RedisTlsConfig(Section):
    """For ``rediss://`` with a private authority, or with client certificates. PEM files."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    check_hostname: bool = True
    """Off only for certificates without names."""

    def options(self) -> dict[str, object]:
        """What a client of redis-py takes for it."""
        files = {"ssl_ca_certs": self.ca, "ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        given = {name: str(path) for name, path in files.items() if path is not None}
        return {"ssl_check_hostname": self.check_hostname, **given}

    @model_validator(mode="after")
    def _pair(self) -> RedisTlsConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both, or neither")
        return self


class RedisConfig(Section):
    """One Redis for jobs and the noise cache; the password comes from DARKROOM_REDIS_URL."""

    url: str | None = None
    timeout_s: Positive = 0.5
    tls: RedisTlsConfig = RedisTlsConfig()

    @model_validator(mode="after")
    def _encrypted(self) -> RedisConfig:
        if self.tls != RedisTlsConfig() and self.url and not self.url.startswith("rediss://"):
            raise ValueError("redis.tls is for URLs that begin with rediss://; this one does not")
        return self


class ContentConfig(Section):
    """What is looked at before a picture is released."""

    check: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """``package.module:callable`` of the operator's own check (:mod:`server.content_check`)."""


class CacheConfig(Section):
    """The noise cache: in each worker's memory, or shared by all of them in Redis."""

    enabled: bool = True
    default: Literal["off", "approximate"] = "off"
    """What a request gets that names neither a seed nor ``cache``."""
    max_bytes: Annotated[int, Field(gt=0)] = 256 << 20
    """Of one tenant's states of one model; never exceeded."""
    policy: Literal["gdsf", "lcbfu", "lru", "lfu", "fifo"] = "gdsf"
    half_life_s: Positive = DEFAULT_HALF_LIFE_S
    """Under ``lcbfu``: after so long without a use, a state's benefit counts half."""
    budget_s: Positive = 0.05
    """How long a request waits for the cache; what takes longer is a counted miss."""
    share_between_tenants: bool = False
    """Whoever shares states can be asked, by similar prompts, what others have drawn."""


class LoggingConfig(Section):
    """Structured logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"
    prompts: bool = False
    """Whether prompts may appear in logs."""


class ServeConfig(Section):
    """The whole of it."""

    models: tuple[ModelConfig, ...] = (ModelConfig(id="tintype"),)
    """The first is the default."""
    http: HttpConfig = HttpConfig()
    limits: LimitsConfig = LimitsConfig()
    workers: WorkersConfig = WorkersConfig()
    admission: AdmissionConfig = AdmissionConfig()
    auth: AuthConfig = AuthConfig()
    jobs: JobsConfig = JobsConfig()
    redis: RedisConfig = RedisConfig()
    cache: CacheConfig = CacheConfig()
    content: ContentConfig = ContentConfig()
    logging: LoggingConfig = LoggingConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    drain_timeout_s: Positive = 30.0
    """How long in-flight requests may go on after SIGTERM."""

    @model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        if not self.models:
            raise ValueError("models: at least one is needed")
        names = [name for model in self.models for name in (model.id, *model.aliases)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"models: {twice[0]!r} names two of them")
        for model in self.models:
            try:
                model.runtime(self.workers.device)
            except InvalidRequestError as error:
                raise ValueError(
                    f"models.{model.id}: {error} (workers.device is {self.workers.device})"
                ) from None
        if self.http.gateways > 1 and self.redis.url is None:
            raise ValueError(
                f"http.gateways is {self.http.gateways}: they share jobs in Redis, and redis.url is"
                " not set"
            )
        if self.auth_on and not any(tenant.key_hashes for tenant in self.auth.tenants):
            why = "" if self.auth.enabled else f" (http.host is {self.http.host}, not loopback)"
            raise ValueError(
                f"requests need an API key{why}, but no tenant has one; `darkroom keys new` makes"
                " one, and `auth: {enabled: false}` opens the server to whoever can reach it"
            )
        return self

    @property
    def auth_on(self) -> bool:
        """Whether requests need a key."""
        if self.auth.enabled is None:
            return bool(self.auth.tenants) or not self.http.loopback
        return self.auth.enabled
