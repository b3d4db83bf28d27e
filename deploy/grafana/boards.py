"""What is on each dashboard."""

from __future__ import annotations

from dataclasses import replace

from deploy.grafana.panels import (
    DRAWING,
    RATE,
    Board,
    Panel,
    Query,
    Row,
    mean,
    quantiles,
    rate,
)

_NO_CACHE = "the cache is off by default: requests opt in with `cache`"
_NO_FAULT = "nothing went wrong"
_GATEWAY = "darkroom_http_request_seconds"

OVERVIEW = Board(
    "overview",
    "Darkroom: overview",
    "Is it up, is it quick, is it full?",
    (
        Row(
            "Traffic",
            (
                Panel(
                    title="Requests by outcome",
                    why="`ok`, or the code of the error. Split by route when one grows.",
                    queries=(rate(f"darkroom_http_requests_total{{{DRAWING}}}", "outcome"),),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    title="Latency",
                    why="Whole requests that draw. The objective is 95 % within 10 s.",
                    queries=tuple(
                        replace(q, expr=q.expr.replace("_bucket[", f"_bucket{{{DRAWING}}}["))
                        for q in quantiles(_GATEWAY)
                    ),
                    unit="s",
                ),
                Panel(
                    title="Pictures",
                    why="Pictures that left the workers, by model.",
                    queries=(rate("darkroom_pictures_total", "model"),),
                    unit="reqps",
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Saturation",
            (
                Panel(
                    title="Steps that wait and run",
                    why="UNet rows at native size. Steady growth of what waits: add workers.",
                    queries=(
                        Query("sum(darkroom_router_queued_steps)", "waiting"),
                        Query("sum(darkroom_router_running_steps)", "running"),
                    ),
                    stacked=True,
                ),
                Panel(
                    title="Refusals by reason",
                    why="`overloaded` is admission at work: the queue is full, or a deadline cannot"
                    " be met.",
                    queries=(rate("darkroom_http_refusals_total", "reason"),),
                    unit="reqps",
                    may_be_empty="nothing was refused",
                ),
                Panel(
                    title="Not admitted, by bound",
                    why="Which bound of the admission: the queue's, a tenant's, the wait, the"
                    " deadline. A request that comes in after all in fewer steps counts as well.",
                    queries=(
                        rate("darkroom_gateway_refusals_total", "reason", "gateway: {{reason}}"),
                        rate("darkroom_router_refusals_total", "reason", "router: {{reason}}"),
                    ),
                    unit="reqps",
                    may_be_empty="nothing was refused",
                ),
                Panel(
                    title="Requests in flight",
                    why="Requests that have begun and not ended, streams included.",
                    queries=(Query("sum(darkroom_http_requests_in_flight)", "in flight"),),
                ),
            ),
        ),
        Row(
            "Health",
            (
                Panel(
                    title="Replicas that answer",
                    why="0 for ten minutes after a replica's last answer.",
                    queries=(Query("darkroom_replica_up", "{{replica}}"),),
                ),
                Panel(
                    title="Memory of workers",
                    why="Resident. A slope is a leak; a step is a model that was loaded.",
                    queries=(Query("darkroom_worker_resident_memory_bytes", "{{replica}}"),),
                    unit="bytes",
                ),
                Panel(
                    title="Workers lost, tasks orphaned",
                    why="Workers that a gateway could not reach, and tasks that nobody waited for"
                    " any more.",
                    queries=(
                        Query(f"sum(increase(darkroom_router_lost_workers_total[{RATE}]))", "lost"),
                        Query(f"sum(increase(darkroom_router_orphans_total[{RATE}]))", "orphaned"),
                    ),
                ),
            ),
        ),
    ),
)

TIME = Board(
    "time",
    "Darkroom: where does the time go",
    "Why was this request slow?",
    (
        Row(
            "Phases of a picture",
            (
                Panel(
                    title="Phases, median",
                    why="`queue` is waiting for a first step, `denoise` the steps themselves.",
                    queries=quantiles("darkroom_phase_seconds", "phase", (0.5,)),
                    unit="s",
                    stacked=True,
                ),
                Panel(
                    title="Phases, p95",
                    why="When only `queue` grows, the service is too small; when `denoise` grows"
                    " with the batch, that is what sharing costs.",
                    queries=quantiles("darkroom_phase_seconds", "phase", (0.95,)),
                    unit="s",
                ),
                Panel(
                    title="Time to first preview",
                    why="Streaming requests: from the request's head to the first picture.",
                    queries=quantiles("darkroom_first_preview_seconds"),
                    unit="s",
                    may_be_empty="nobody streamed",
                ),
            ),
        ),
        Row(
            "Ticks",
            (
                Panel(
                    title="Tick duration",
                    why="One run of the UNet over one batch.",
                    queries=quantiles("darkroom_tick_seconds"),
                    unit="s",
                ),
                Panel(
                    title="Batch against saturation",
                    why="Mean UNet rows of a tick, and B*, beyond which more rows only wait for"
                    " each other.",
                    queries=(
                        mean("darkroom_tick_rows", "rows a tick"),
                        Query("max(darkroom_saturation_rows)", "B*"),
                    ),
                ),
                Panel(
                    title="Steps done",
                    why="Steps a second over all pictures: the service's real throughput.",
                    queries=(rate("darkroom_steps_total", "model"),),
                ),
            ),
        ),
        Row(
            "Models and memory",
            (
                Panel(
                    title="Model loads and unloads",
                    why="A steady rate means that models take turns in too little memory.",
                    queries=(
                        Query("sum by (model) (darkroom_model_loads_total)", "{{model}} loaded"),
                        Query(
                            "sum by (model) (darkroom_model_unloads_total)", "{{model}} unloaded"
                        ),
                    ),
                    may_be_empty=None,
                ),
                Panel(
                    title="Memory of models",
                    why="What each loaded model takes of its worker's budget.",
                    queries=(Query("darkroom_model_memory_bytes", "{{model}} on {{replica}}"),),
                    unit="bytes",
                ),
                Panel(
                    title="Batches split for memory",
                    why="Requests are still answered, more slowly.",
                    queries=(rate("darkroom_out_of_memory_splits_total", "model"),),
                    may_be_empty=_NO_FAULT,
                ),
            ),
        ),
    ),
)

CACHE = Board(
    "cache",
    "Darkroom: noise cache",
    "What the cache spares, and what it costs.",
    (
        Row(
            "Hits",
            (
                Panel(
                    title="Lookups by outcome",
                    why="`slow` and `failed` are misses that the store is to blame for.",
                    queries=(rate("darkroom_cache_lookups_total", "outcome"),),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    title="Steps saved",
                    why="Of all steps that pictures would have taken.",
                    queries=(
                        Query(
                            f"sum(rate(darkroom_cache_steps_saved_total[{RATE}]))"
                            f" / sum(rate(darkroom_cache_steps_asked_total[{RATE}]))",
                            "share",
                        ),
                    ),
                    unit="percentunit",
                ),
                Panel(
                    title="Jump of hits",
                    why="Share of the steps that a hit skips.",
                    queries=quantiles("darkroom_cache_jump_ratio", of=(0.1, 0.5, 0.9)),
                    unit="percentunit",
                    may_be_empty=_NO_CACHE,
                ),
            ),
        ),
        Row(
            "Store",
            (
                Panel(
                    title="Bytes",
                    why="By backend and eviction policy; never above the limit of a namespace times"
                    " the namespaces.",
                    queries=(Query("darkroom_cache_bytes", "{{backend}} {{policy}} {{replica}}"),),
                    unit="bytes",
                ),
                Panel(
                    title="Offers and evictions",
                    why="`dropped`: the writer's queue was full, so that no picture waited for it.",
                    queries=(
                        rate("darkroom_cache_offers_total", "outcome"),
                        rate("darkroom_cache_evictions_total", "policy", "evicted by {{policy}}"),
                    ),
                    unit="reqps",
                ),
                Panel(
                    title="Faults",
                    why="Each was a miss or a lost offer, never a failed request.",
                    queries=(rate("darkroom_cache_faults_total", "kind"),),
                    unit="reqps",
                ),
            ),
        ),
        Row(
            "Similarity",
            (
                Panel(
                    title="Similarity of the closest prompt",
                    why="Low values say that traffic does not repeat itself.",
                    queries=quantiles("darkroom_cache_similarity_ratio", of=(0.1, 0.5, 0.9)),
                    may_be_empty=_NO_CACHE,
                ),
                Panel(
                    title="Entries and states",
                    why="Pictures that left states, and the states.",
                    queries=(
                        Query("sum(darkroom_cache_entries)", "entries"),
                        Query("sum(darkroom_cache_states)", "states"),
                    ),
                ),
                Panel(
                    title="Store answers",
                    why="0: Redis is away; requests go on without the cache.",
                    queries=(Query("min(darkroom_cache_available)", "available"),),
                ),
            ),
        ),
    ),
)

TENANTS = Board(
    "tenants",
    "Darkroom: tenants",
    "Who uses it, and who is turned away.",
    (
        Row(
            "Use",
            (
                Panel(
                    title="Pictures by tenant",
                    why="Pictures handed out.",
                    queries=(rate("darkroom_gateway_pictures_total", "tenant"),),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    title="Pictures by model",
                    why="Pictures handed out, over all tenants.",
                    queries=(rate("darkroom_gateway_pictures_total", "model"),),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    title="Turned away",
                    why="By reason: keys, rates, sizes, overload.",
                    queries=(rate("darkroom_http_refusals_total", "reason"),),
                    unit="reqps",
                    may_be_empty="nobody was turned away",
                ),
            ),
        ),
    ),
)

BOARDS = (OVERVIEW, TIME, CACHE, TENANTS)
