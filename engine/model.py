"""A plan that is open and ready to run: its network, text encoders, autoencoder and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from engine.compile.manifest import SegmentSpec
from engine.compile.plan import Plan
from engine.denoiser import Denoiser
from engine.runtime.base import Graph, Runtime
from engine.solvers import from_scheduler_config
from engine.text import PromptEncoder
from engine.trajectory import LaneKey
from engine.vae import Preview, Vae


class Model:
    """Everything that a plan needs to draw, opened on one runtime. Close it when done.

    Attributes:
        spec: what the plan says of the checkpoint.
        digest: of the plan.
        solver_defaults: solver, schedule, noise schedule and prediction of the checkpoint.
        prompts, vae, denoiser: its parts, ready to call from any thread.
        preview: draws a small picture from a clean prediction; None where the plan has no map.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        prompts: PromptEncoder,
        vae: Vae,
        denoiser: Denoiser,
        runtime: Runtime,
        resources: ExitStack,
    ) -> None:
        self.plan = plan
        self.device = runtime.device
        self.threads = runtime.threads
        self.spec = plan.manifest.model
        self.digest = plan.manifest.digest
        self.solver_defaults = from_scheduler_config(self.spec.scheduler_config)
        self.prompts = prompts
        self.vae = vae
        self.denoiser = denoiser
        matrix = plan.manifest.preview
        self.preview = None if matrix is None else Preview(matrix)
        self._resources = resources

    @classmethod
    def open(cls, plan: Plan, runtime: Runtime) -> Model:
        """Open every graph of ``plan``. The caller keeps the runtime and closes it last.

        Raises:
            PlanCorruptError, BackendUnavailableError: see :meth:`Runtime.open`.
        """
        manifest = plan.manifest
        with ExitStack() as opened:

            def graph(segment: SegmentSpec) -> Graph:
                result = runtime.open(plan.folder, manifest, segment)
                opened.callback(result.close)
                return result

            denoiser = Denoiser(plan, runtime)
            opened.callback(denoiser.close)
            prompts = PromptEncoder(
                manifest.model,
                manifest.text_encoders,
                [graph(spec.segment) for spec in manifest.text_encoders],
                plan.folder,
                device=runtime.device,
            )
            encoder = manifest.vae_encoder
            vae = Vae(
                manifest.model.latent,
                graph(manifest.vae_decoder),
                None if encoder is None else graph(encoder),
                device=runtime.device,
            )
            # From here on the model closes what was opened; before, an error has.
            resources = opened.pop_all()
        return cls(
            plan,
            prompts=prompts,
            vae=vae,
            denoiser=denoiser,
            runtime=runtime,
            resources=resources,
        )

    @property
    def takes_mask(self) -> bool:
        """Whether the UNet has inputs for a mask and a masked picture (9 channels)."""
        return self.spec.in_channels == 2 * self.spec.latent.channels + 1

    @property
    def approximations(self) -> Mapping[str, str]:
        """What the plan itself approximates, by name, with its dial."""
        precision = self.plan.manifest.precision
        return {} if precision == "fp32" else {"precision": precision}

    def latent_shape(self, width_px: int, height_px: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a picture."""
        latent = self.spec.latent
        return latent.channels, height_px // latent.factor_px, width_px // latent.factor_px

    def native_lane(self) -> LaneKey:
        """The lane of an unadorned request at the checkpoint's own size."""
        side_px = self.spec.latent.native_px
        tokens = self.plan.manifest.text_encoders[0].max_tokens
        return LaneKey(self.digest, self.latent_shape(side_px, side_px), tokens)

    def blank_walk(self, lane: LaneKey) -> Callable[[int], None]:
        """A function that runs the network once on so many rows of zeros, for measuring."""

        manifest = self.plan.manifest
        made = {port.source for segment in manifest.unet for port in segment.outputs}
        ports = {
            port.source: port
            for segment in manifest.unet
            for port in segment.inputs
            if port.source not in made and not port.source.startswith("tap.")
        }
        _, height, width = lane.latent_shape

        def run(rows: int) -> None:
            sizes = {"batch": rows, "height": height, "width": width, "tokens": lane.tokens}
            feeds = {
                source: torch.zeros(
                    [dim if isinstance(dim, int) else sizes[dim] for dim in port.shape],
                    device=self.device,
                )
                for source, port in ports.items()
            }
            self.denoiser.run(feeds)

        return run

    def close(self) -> None:
        """Close every graph. Closing twice is harmless."""
        self._resources.close()
