"""News from threads to a coroutine: in order, bounded, and never lost where it matters."""

from __future__ import annotations

import asyncio
import threading

import torch

from engine.errors import ExecutionError
from engine.types import Snapshot, SnapshotGrade, StepEvent
from server.mailbox import MAX_STEPS, Begun, Mailbox, News


def step(number: int) -> StepEvent:
    return StepEvent("t", number, 10**6, log_snr=0.0, batch_rows=1, tick_s=0.1)


def snapshot(row: int) -> Snapshot:
    return Snapshot(SnapshotGrade.FULL, log_snr=0.0, x=torch.zeros(2, 2), clean=None, row=row)


def read(mailbox_of: list[News], count: int) -> list[News]:
    """Put everything before the first read, then read ``count``."""

    async def scenario() -> list[News]:
        mailbox = Mailbox(asyncio.get_running_loop())
        for news in mailbox_of:
            mailbox.put(news)
        return [await asyncio.wait_for(mailbox.get(), 10.0) for _ in range(count)]

    return asyncio.run(scenario())


def test_news_comes_in_order() -> None:
    put: list[News] = [Begun(), step(1), snapshot(1), step(2), ExecutionError("the end")]
    got = read(put, len(put))
    assert all(one is other for one, other in zip(got, put, strict=True))


def test_a_slow_reader_keeps_the_newest_steps_and_one_snapshot() -> None:
    begun, end = Begun(), ExecutionError("the end")
    put: list[News] = [begun]
    for number in range(1, 201):
        put += [step(number), snapshot(number)]
    got = read([*put, end], MAX_STEPS + 3)
    assert got[0] is begun
    assert got[-1] is end
    steps = [news.step for news in got if isinstance(news, StepEvent)]
    assert steps == list(range(201 - MAX_STEPS, 201))
    assert [news.row for news in got if isinstance(news, Snapshot)] == [200]


def test_threads_wake_the_reader() -> None:
    async def scenario() -> list[News]:
        mailbox = Mailbox(asyncio.get_running_loop())
        reading = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)  # it waits now
        first = step(1)
        thread = threading.Thread(target=mailbox.put, args=(first,))
        thread.start()
        got = [await asyncio.wait_for(reading, 10.0)]
        thread.join()
        mailbox.put(Begun())
        return [*got, await asyncio.wait_for(mailbox.get(), 10.0)]

    got = asyncio.run(scenario())
    assert [type(news) for news in got] == [StepEvent, Begun]


def test_a_reader_that_is_gone_troubles_nobody() -> None:
    async def make() -> Mailbox:
        return Mailbox(asyncio.get_running_loop())

    mailbox = asyncio.run(make())
    mailbox.put(Begun())  # its event loop is closed
