"""A lane: trajectories that can share a tick, and the slot arrays that hold their resident state.

A tick gathers by slot index, computes, and scatters back. Nothing per-trajectory lives anywhere
else, so joining and leaving between two ticks is one copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.errors import OverloadedError
from engine.rows import Rows
from engine.trajectory import LaneKey, Trajectory, table_digest
from engine.types import Snapshot, SnapshotGrade

_FIRST_CAPACITY = 4
_FLOAT_BYTES = 4


_Forms = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class _Gathered:
    """What the rows of one tick share with those of the next, if the same members go on.

    Attributes:
        key: slots of the members, and positions of the guided ones.
        members: (members,) slots.
        rows: (rows,) slots: every member's prompt row, then the negative rows.
        guided: (guided,) positions of the members that have a negative row.
        order: the members' positions in the order of ``rows``.
    """

    key: tuple[tuple[int, ...], tuple[int, ...]]
    members: torch.Tensor
    rows: torch.Tensor
    guided: torch.Tensor
    order: tuple[int, ...]
    context: torch.Tensor
    added: dict[str, torch.Tensor]


class Lane:
    """Slot arrays for trajectories of one :class:`LaneKey`; grows by doubling up to ``max_slots``.

    Not thread-safe: the loop's thread owns it.
    """

    def __init__(self, key: LaneKey, *, slots: int, max_slots: int, device: torch.device) -> None:
        self.key = key
        self.members: dict[str, tuple[int, Trajectory]] = {}
        self._max_slots = max_slots
        self._device = device
        self._free: list[int] = []
        # slots + 1 planes: the solver's state stack, then the last clean prediction.
        self._planes = slots + 1
        self._arrays: dict[str, torch.Tensor] = {}
        self._forms: dict[str, _Forms] = {}
        self._capacity = 0
        self._gathered: _Gathered | None = None

    def __len__(self) -> int:
        return len(self.members)

    @property
    def resident_bytes(self) -> int:
        """Memory of the slot arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def join(self, trajectory: Trajectory, *, max_bytes: int | None = None) -> None:
        """Give a trajectory a slot and copy its state in. One that raises leaves no trace.

        Args:
            max_bytes: what the lane's arrays may take afterwards; None for any amount.

        Raises:
            OverloadedError: the lane is full, in slots or in bytes.
        """
        parts, forms = self._parts(trajectory), _forms(trajectory)
        new = [name for name in parts if name not in self._arrays]
        self._reserve({name: shape for name, (shape, _) in parts.items()}, max_bytes)
        slot = self._free.pop()
        try:
            for name, (shape, value) in parts.items():
                target = self._array(name, shape)[slot]
                target.zero_()
                target[: len(value)] = value
        except BaseException:
            self._free.append(slot)
            for name in new:
                self._arrays.pop(name, None)
            raise
        self.members[trajectory.id] = (slot, trajectory)
        self._forms[trajectory.id] = forms
        self._gathered = None

    def leave(self, trajectory_id: str) -> None:
        """Free a member's slot."""
        self._gathered = None
        slot, _ = self.members.pop(trajectory_id)
        del self._forms[trajectory_id]
        self._free.append(slot)

    def rows(self, members: Sequence[Trajectory]) -> Rows:
        """Gather the inputs of one walk."""
        gathered = self._gather(members)
        sample = self._arrays["state"][gathered.rows, 0]
        if "extra" in self._arrays:
            sample = torch.cat([sample, self._arrays["extra"][gathered.rows]], dim=1)
        times = [float(member.table.timesteps[member.row]) for member in members]
        return Rows(
            sample,
            torch.tensor([times[i] for i in gathered.order], device=self._device),
            gathered.context,
            gathered.added,
            gathered.guided,
        )

    def _gather(self, members: Sequence[Trajectory]) -> _Gathered:
        """Gather once while the same rows tick together: it is most of what they read."""
        chosen = self._chosen(members)
        wants = tuple(i for i, member in enumerate(members) if member.guided[member.row])
        if self._gathered is None or self._gathered.key != (chosen, wants):
            order = (*range(len(members)), *wants)
            slots = self._indices([chosen[i] for i in order])
            # Whether a row takes the prompt (0) or the negative one (1).
            kind = self._indices([0] * len(members) + [1] * len(wants))
            self._gathered = _Gathered(
                key=(chosen, wants),
                members=self._indices(chosen),
                rows=slots,
                guided=self._indices(wants),
                order=order,
                context=self._arrays["context"][slots, kind],
                added={
                    name.removeprefix("added."): array[slots, kind]
                    for name, array in self._arrays.items()
                    if name.startswith("added.")
                },
            )
        return self._gathered

    def advance(self, members: Sequence[Trajectory], out: torch.Tensor) -> None:
        """Move every member one row down its own table: one batched multiply-add.

        Args:
            out: (members, channels, height, width) network output after guidance.
        """
        slots = self._slots(members)
        shape = self.key.latent_shape
        vectors = self._arrays["state"].index_select(0, slots)
        vectors[:, -1] = out  # in the place of the last clean prediction, which no table reads
        forms = np.stack([self._forms[member.id][member.row] for member in members])
        matrices = torch.from_numpy(forms).to(self._device)
        moved = torch.bmm(matrices[..., :-1], vectors.flatten(2)).view_as(vectors)
        for i, member in enumerate(members):
            if member.table.draws_noise[member.row]:
                # Drawn here and on the CPU, as Diffusers does, so that neither batch mates nor
                # the device change a picture; after the walk, so that a retry draws nothing twice.
                noise = torch.randn((1, *shape), generator=member.generator).to(self._device)
                moved[i] += matrices[i, :, -1].view(-1, 1, 1, 1) * noise
            member.row += 1
            if member.blend is not None:
                self._blend(moved[i, 0], member, self.members[member.id][0])
        self._arrays["state"][slots] = moved

    def snapshot(self, trajectory: Trajectory, grade: SnapshotGrade) -> Snapshot:
        """Copy a member's state out, on the CPU."""
        slot, _ = self.members[trajectory.id]
        log_snr = float(trajectory.table.log_snr[trajectory.row])
        if grade is SnapshotGrade.STATE:
            x = self.latent(trajectory)
            return Snapshot(grade, log_snr, x, self.clean(trajectory) if trajectory.row else None)
        state = self._arrays["state"][slot].to("cpu", copy=True)
        clean = state[-1] if trajectory.row else None
        return Snapshot(
            grade,
            log_snr,
            state[0],
            clean,
            state=state[:-1],
            row=trajectory.row,
            generator_state=trajectory.generator.get_state().numpy().tobytes(),
            plan_digest=self.key.plan_digest,
            table_digest=table_digest(trajectory.table),
            entered_at=trajectory.entered_at,
        )

    def latent(self, trajectory: Trajectory) -> torch.Tensor:
        """A copy of a member's x: (channels, height, width), on the CPU."""
        slot, _ = self.members[trajectory.id]
        return self._arrays["state"][slot, 0].to("cpu", copy=True)

    def clean(self, trajectory: Trajectory) -> torch.Tensor:
        """A copy of a member's last clean prediction, on the CPU."""
        slot, _ = self.members[trajectory.id]
        return self._arrays["state"][slot, -1].to("cpu", copy=True)

    def _blend(self, x: torch.Tensor, member: Trajectory, slot: int) -> None:
        """Put the kept part of an inpainted picture, at the level of ``x``, back into it.

        After the last row it is put back clean, also under schedules that end a little short of it.
        """
        alpha, sigma = member.table.level(member.row) if member.steps_left else (1.0, 0.0)
        kept = alpha * self._arrays["blend.kept"][slot] + sigma * self._arrays["blend.noise"][slot]
        mask = self._arrays["blend.mask"][slot]
        x.mul_(mask).add_((1.0 - mask) * kept)

    def _chosen(self, members: Sequence[Trajectory]) -> tuple[int, ...]:
        return tuple(self.members[member.id][0] for member in members)

    def _slots(self, members: Sequence[Trajectory]) -> torch.Tensor:
        chosen = self._chosen(members)
        if self._gathered is not None and self._gathered.key[0] == chosen:
            return self._gathered.members
        return self._indices(chosen)

    def _indices(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def _array(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The slot array ``name``, made when a first member needs it."""
        if name not in self._arrays:
            self._arrays[name] = torch.zeros(self._capacity, *shape, device=self._device)
        return self._arrays[name]

    def _parts(self, trajectory: Trajectory) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
        """What a trajectory keeps here: shape of its slot, and what goes into the front of it."""
        start, text = trajectory.start, trajectory.conditioning
        parts = {
            "state": (
                (self._planes, *self.key.latent_shape),
                start if start.ndim == 4 else start[None],
            ),
            "context": ((2, *text.context.shape[1:]), text.context),
        }
        for name, value in text.added.items():
            parts[f"added.{name}"] = (2, *value.shape[1:]), value
        whole = {"extra": trajectory.extra}
        if (blend := trajectory.blend) is not None:
            whole |= {
                "blend.mask": blend.mask,
                "blend.kept": blend.clean,
                "blend.noise": blend.noise,
            }
        parts |= {
            name: (tuple(value.shape), value) for name, value in whole.items() if value is not None
        }
        return parts

    def _reserve(self, shapes: Mapping[str, tuple[int, ...]], max_bytes: int | None) -> None:
        """Make sure that there is a free slot, and memory for arrays of ``shapes``."""
        if not self._free and self._capacity >= self._max_slots:
            raise OverloadedError(f"the lane is full: {self._max_slots} live trajectories")
        known = {name: tuple(array.shape[1:]) for name, array in self._arrays.items()}
        slot_bytes = _FLOAT_BYTES * sum(math.prod(shape) for shape in {**shapes, **known}.values())
        affordable = self._max_slots if max_bytes is None else max(0, max_bytes) // slot_bytes
        if affordable < (self._capacity if self._free else self._capacity + 1):
            raise OverloadedError(
                f"no memory is left for the state of one more trajectory: it needs"
                f" {slot_bytes} bytes beside {len(self.members)} like it"
            )
        if not self._free:
            wanted = max(_FIRST_CAPACITY, 2 * self._capacity)
            self._grow(min(self._max_slots, affordable, wanted))

    def _grow(self, capacity: int) -> None:
        for name, old in self._arrays.items():
            grown = torch.zeros(capacity, *old.shape[1:], device=self._device)
            grown[: self._capacity] = old
            self._arrays[name] = grown
        self._free.extend(range(capacity - 1, self._capacity - 1, -1))
        self._capacity = capacity


def _forms(member: Trajectory) -> _Forms:
    """(rows, planes, columns): per table row its matrix, and under it the clean prediction's."""
    table = member.table
    clean = np.zeros((table.evaluations, 1, table.transition.shape[-1]))
    clean[:, 0, 0], clean[:, 0, -2] = table.clean[:, 0], table.clean[:, 1]
    return np.concatenate([table.transition, clean], axis=1, dtype=np.float32)


def combine_guidance(
    out: torch.Tensor,
    guided: torch.Tensor,
    scales: torch.Tensor,
    rescale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022), each member at its own scale.

    Args:
        out: (members + guided, …) network output in :class:`Rows` order.
        guided: (k,) positions of the guided members.
        scales: (k,) their scales.
        rescale: (k,) parts by which the result gets back the standard deviation of the prompt's
            prediction (Lin et al., 2023), as Diffusers' ``rescale_noise_cfg`` does it; None
            rescales nothing.

    Returns:
        (members, …): ``negative + scale * (prompt - negative)`` where guided, rescaled.
    """
    members = len(out) - len(guided)
    everybody = len(guided) == members
    each = (-1, *[1] * (out.ndim - 1))
    prompt, negative = out[:members] if everybody else out[guided], out[members:]
    steered = negative + scales.view(each) * (prompt - negative)
    if rescale is not None:
        kept = (prompt.flatten(1).std(dim=1) / steered.flatten(1).std(dim=1)).view(each)
        part = rescale.view(each)
        # Rows without rescaling must come out bit-equal whoever shares their batch.
        steered = torch.where(part > 0, part * (steered * kept) + (1 - part) * steered, steered)
    if everybody:
        return steered
    combined = out[:members].clone()
    combined[guided] = steered
    return combined
