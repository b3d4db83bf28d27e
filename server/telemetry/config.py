"""The section ``telemetry`` of the configuration: where traces go."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

TRACES_PATH = "/v1/traces"
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]{0,4096}")


class TelemetryConfig(BaseModel):
    """OpenTelemetry traces; off while there is no endpoint. Needs the extra ``otel``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str | None = None
    """Base address of an OTLP/HTTP receiver (``http://collector:4318``); spans go to its
    ``/v1/traces``. OTEL_EXPORTER_OTLP_ENDPOINT sets it too."""
    headers: dict[str, SecretStr] = Field(default_factory=dict, max_length=16)
    """Sent with every export: the receiver's key. OTEL_EXPORTER_OTLP_HEADERS sets them too, as
    ``name=value,name=value`` with percent-encoded values."""
    service_name: Annotated[str, Field(min_length=1, max_length=255)] = "darkroom"
    sample_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Of requests that do not come with a ``traceparent``; those that do have it decided."""
    timeout_s: Annotated[float, Field(gt=0.0, le=60.0)] = 5.0
    """For one export, retries included; then its spans are lost."""
    max_queued_spans: Annotated[int, Field(ge=1, le=100_000)] = 2048
    """That wait for the receiver; past it, new ones are lost."""
    flush_timeout_s: Annotated[float, Field(gt=0.0, le=8.0)] = 3.0
    """How long a gateway that has drained waits for its last spans to be taken."""

    @field_validator("endpoint")
    @classmethod
    def _is_a_base(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        try:
            parts = urlsplit(endpoint)
            _ = parts.port
        except ValueError:
            raise ValueError("is no address; allowed: http://host:port or https://…") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must begin with http:// or https:// and name a host")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("holds more than an address; credentials belong in telemetry.headers")
        if parts.path.rstrip("/").endswith(TRACES_PATH):
            raise ValueError(f"is the receiver's base; {TRACES_PATH} is added to it")
        return endpoint.rstrip("/")

    @field_validator("headers", mode="before")
    @classmethod
    def _read_pairs(cls, headers: Any) -> Any:
        """The form of the environment variable: it cannot hold a mapping."""
        if not isinstance(headers, str):
            return headers
        pairs = [pair.partition("=") for pair in headers.split(",") if pair.strip()]
        if any(not equals for _, equals, _ in pairs):
            raise ValueError("allowed: name=value, separated by commas")
        return {name.strip(): unquote(value.strip()) for name, _, value in pairs}

    @field_validator("headers")
    @classmethod
    def _can_be_sent(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        # What is wrong may be the secret itself, so neither name nor value is repeated.
        if not all(_HEADER_NAME.fullmatch(name) for name in headers):
            raise ValueError("a name is no name of an HTTP header")
        if not all(_HEADER_VALUE.fullmatch(value.get_secret_value()) for value in headers.values()):
            raise ValueError("a value has other characters than printable ASCII, or over 4096")
        return headers

    @property
    def traces_url(self) -> str | None:
        """Where spans are posted; None while traces are off."""
        return None if self.endpoint is None else self.endpoint + TRACES_PATH
