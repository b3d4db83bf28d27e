"""A request's events as OpenAI's clients know them: previews, finished pictures, an error."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import DarkroomError
from server.errors import body_of, row_of
from server.ladder import Admitted
from server.messages import Drawn, Failed, PictureEvent, Stepped
from server.metrics import GatewayMetrics
from server.replies import usage_of
from server.request_log import RequestRecord
from server.schemas.draw import DrawnReply
from server.schemas.openai import GenerationBody
from server.sizes import text_of
from server.sse import ServerEvent

_log = logging.getLogger(__name__)

Kind = Literal["image_generation", "image_edit"]


@dataclass(slots=True, kw_only=True)
class ImageStream:
    """Translates the events of one order that was admitted.

    Attributes:
        began_s: when the request came, on ``now_s``'s clock.
    """

    kind: Kind
    body: GenerationBody
    admitted: Admitted
    record: RequestRecord
    metrics: GatewayMetrics
    tenant: str
    began_s: float
    now_s: Callable[[], float] = time.monotonic
    _previews: dict[int, int] = field(default_factory=dict)

    async def events(self) -> AsyncGenerator[ServerEvent, None]:
        """Events to send. A failure is the last one: the status line has long gone out."""
        pictures: list[Drawn] = []
        try:
            async for event in self.admitted.events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Drawn):
                    event = self.admitted.named(event)
                    pictures.append(event)
                if (translated := self._translate(event)) is not None:
                    yield translated
        except (GeneratorExit, asyncio.CancelledError):
            self.record.failed("cancelled")  # the client went
            raise
        except DarkroomError as error:
            yield self._error(error)
        except Exception as error:
            _log.exception(
                "a stream failed", extra={"darkroom_fields": {"request_id": self.record.id}}
            )
            yield self._error(error)
        finally:
            self.record.drew(pictures)
            self.metrics.drew(pictures, tenant=self.tenant, request_id=self.record.id)

    def _translate(self, event: PictureEvent) -> ServerEvent | None:
        if isinstance(event, Stepped) and event.preview is not None:
            return self._preview(event, event.preview)
        if isinstance(event, Drawn):
            return self._completed(event)
        return None

    def _preview(self, event: Stepped, data: bytes) -> ServerEvent:
        if not self._previews:
            seconds = self.now_s() - self.began_s
            self.metrics.previewed(seconds, request_id=self.record.id)
        number = self._previews.get(event.index, 0)
        self._previews[event.index] = number + 1
        return self._named(
            "partial_image",
            {
                "b64_json": base64.b64encode(data).decode(),
                "partial_image_index": number,
                # A preview is a small PNG, whatever the finished picture will be.
                "output_format": "png",
                "darkroom": {"index": event.index, "step": event.step, "steps": event.steps},
            },
        )

    def _completed(self, picture: Drawn) -> ServerEvent:
        order = self.admitted.order
        rows = order.rows // len(order.tasks)
        return self._named(
            "completed",
            {
                "b64_json": base64.b64encode(picture.data).decode(),
                "output_format": picture.format,
                "usage": usage_of(rows).model_dump(),
                "darkroom": DrawnReply.of(picture).model_dump(),
            },
        )

    def _named(self, what: str, fields: dict[str, Any]) -> ServerEvent:
        name = f"{self.kind}.{what}"
        order = self.admitted.order
        common = {
            "type": name,
            "created_at": int(time.time()),
            "size": text_of((order.width_px, order.height_px)),
            "quality": self.body.quality or "auto",
            "background": "opaque",
        }
        return ServerEvent(event=name, data={**common, **fields})

    def _error(self, error: Exception) -> ServerEvent:
        self.record.failed(row_of(error).code)
        return ServerEvent(event="error", data={"type": "error", **body_of(error)})
