"""``darkroom plans``: what compiled models take on the disk, and making room."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engine.compile.plan_space import StoredPlan, choose
from server.settings import GIGABYTE, Settings

plans_app = typer.Typer(
    help="Compiled plans: list what there is, and make room.", invoke_without_command=True
)
_out = Console()
_DAY_S = 86_400.0


@plans_app.callback()
def plans(context: typer.Context) -> None:
    """Without a command: list the plans, least recently used first."""
    if context.invoked_subcommand is not None:
        return
    from engine.compile.plan import PlanStore

    settings = Settings.from_environment()
    found = PlanStore(settings.plans).stored()
    table = Table("plan", "model", "backend", "precision", "MB", "last used", "")
    for plan in found:
        used = datetime.fromtimestamp(plan.used_at_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        state = "in use" if plan.in_use else ""
        size = f"{plan.size_bytes / 1e6:.0f}"
        name = plan.model or "(unreadable)"
        table.add_row(plan.digest[:12], name, plan.backend, plan.precision, size, used, state)
    _out.print(table)
    total_bytes = sum(plan.size_bytes for plan in found)
    _out.print(
        f"{_gigabytes(total_bytes)} of {_gigabytes(settings.plans_max_bytes)} in {settings.plans}",
        soft_wrap=True,
    )


@plans_app.command()
def prune(
    max_gb: Annotated[
        float | None,
        typer.Option(min=0, help="What may stay; by default DARKROOM_PLANS_MAX_GB."),
    ] = None,
    idle_days: Annotated[
        float | None, typer.Option(min=0, help="Also remove what nobody opened for so long.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
) -> None:
    """Remove plans, least recently used first. Those that some process has open stay."""
    from engine.compile.plan import PlanStore

    settings = Settings.from_environment()
    store = PlanStore(settings.plans)
    chosen = choose(
        store.stored(),
        max_bytes=settings.plans_max_bytes if max_gb is None else int(max_gb * GIGABYTE),
        idle_s=None if idle_days is None else idle_days * _DAY_S,
    )
    gone = [plan for plan in chosen if dry_run or store.remove(plan.digest)]
    for plan in gone:
        _out.print(f"{plan.digest[:12]}  {plan.model} {plan.precision}, {_megabytes(plan)}")
    verb = "would be freed" if dry_run else "freed"
    _out.print(f"{_gigabytes(sum(plan.size_bytes for plan in gone))} {verb}")


def _megabytes(plan: StoredPlan) -> str:
    return f"{plan.size_bytes / 1e6:.0f} MB"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / GIGABYTE:.2f} GB"
