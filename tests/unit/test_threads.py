"""A thread that computes alone, and others that do not notice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.threads import compute_alone


@pytest.mark.parametrize("before", [1, 2])
def test_only_the_calling_thread_loses_its_team(before: int) -> None:
    mine = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            other.submit(torch.get_num_threads).result()
            one.submit(compute_alone).result()
            one.submit(torch.arange(200_000).sum).result()  # a parallel loop must not undo it
            assert one.submit(torch.get_num_threads).result() == 1
            assert other.submit(torch.get_num_threads).result() == before
            assert torch.get_num_threads() == before
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == before
    finally:
        torch.set_num_threads(mine)
