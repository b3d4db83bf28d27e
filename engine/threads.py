"""How many threads torch takes for the small operators around a network."""

from __future__ import annotations

import threading

import torch


def compute_alone() -> None:
    """From now on, torch runs the calling thread's CPU operators on that thread alone.

    OpenMP keeps a team for each thread that ever ran a parallel loop, and the team spins for a
    while after every one of them. Gathering and advancing rows is worth no team: it would take the
    cores from the threads that run the network. Other threads keep what they have.
    """
    others = torch.get_num_threads()  # also makes torch initialise this thread, once
    torch.set_num_threads(1)
    if others != 1:
        # It is a thread's own setting, and the default of threads that are still to begin: the
        # default is put back from a thread that ends at once.
        restore = threading.Thread(target=torch.set_num_threads, args=(others,))
        restore.start()
        restore.join()
