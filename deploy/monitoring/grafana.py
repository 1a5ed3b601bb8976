"""The dashboard as code: `python -m deploy.monitoring.grafana` writes deploy/monitoring/dashboard.json, for Grafana 11 or later to import.

Change the panels here, never the JSON. `python -m deploy.monitoring.draw_dashboard` draws the same ones without a Grafana.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboard.json")
WIDTH, HEIGHT, ACROSS = 8, 7, 3  # of a panel, on Grafana's grid of 24
RATE = "$__rate_interval"  # Grafana's own: four scrapes at least
SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """A title, the unit as Grafana names it, what it shows (PromQL by its legend), and how to read it."""

    title: str
    unit: str
    shows: dict[str, str]
    about: str
    kind: str = "timeseries"
    most: float | None = None  # of the axis


def quantiles(name: str) -> dict[str, str]:
    buckets = f"sum by (le) (rate({name}_bucket[{RATE}]))"
    return {f"p{q}": f"histogram_quantile(0.{q}, {buckets})" for q in (50, 90, 99)}


ROWS = {
    "Traffic and errors": [
        Panel(
            "Replies by status",
            "reqps",
            {"{{status}}": f"sum by (status) (rate(model_requests_total[{RATE}]))"},
            "200: answered; 503: rejected at once; 504: late; 500: the model raised; 499: the client disconnected.",
        ),
        Panel(
            "Not answered correctly and in time",
            "percentunit",
            {
                "together": "model:bad:ratio5m",
                "rejected": "model:rejected:ratio5m",
                "failed": "model:failed:ratio5m",
            },
            "Share of the requests without an error of the client, over 5 minutes. The objective is below 1 % over 30 days.",
        ),
        Panel(
            "Inputs that the model answers",
            "cps",
            {"inputs/s": f"sum(rate(model_batch_size_sum[{RATE}]))"},
            "A list of inputs is one request with many inputs.",
        ),
    ],
    "Waits": [
        Panel(
            "Wait for the model",
            "s",
            quantiles("model_queue_wait_seconds"),
            "From admission to the model call. QUEUE_TARGET_S bounds it while there is always a queue.",
        ),
        Panel(
            "A model call",
            "s",
            quantiles("model_call_seconds"),
            "Duration for a whole batch. It rises with longer inputs, or with other load on the same cores.",
        ),
        Panel(
            "How late the event loop wakes up",
            "s",
            quantiles("model_event_loop_lag_seconds"),
            "Above 0.1 s something computes on the event loop: replies and probes are late.",
        ),
    ],
    "The queue and its batches": [
        Panel(
            "In the queue, in the model",
            "short",
            {"waiting": "sum(model_queue_depth)", "running": "sum(model_running)"},
            "A full queue rejects: its bound is MAX_QUEUE, or what can be answered in time.",
        ),
        Panel(
            "Batch sizes",
            "short",
            {"{{le}}": f"sum by (le) (increase(model_batch_size_bucket[{RATE}]))"},
            "How many inputs share a model call.",
            "heatmap",
        ),
        Panel(
            "Why batches were dispatched",
            "short",
            {"{{reason}}": f"sum by (reason) (increase(model_batches_total[{RATE}]))"},
            "empty: the queue was empty; full: BATCH_SIZE; retry: a batch failed, so each input ran alone; draining: the server stops.",
            "heatmap",
        ),
    ],
    "Text, token by token": [
        Panel(
            "Time to the first token",
            "s",
            quantiles("model_time_to_first_token_seconds"),
            "From admission. DEADLINE_S bounds it: what would take longer is rejected.",
        ),
        Panel(
            "Between two tokens",
            "s",
            quantiles("model_inter_token_latency_seconds"),
            "A gap is a step; beside long prompts it is up to three.",
        ),
        Panel(
            "Tokens",
            "cps",
            {"{{kind}}": f"sum by (kind) (rate(model_tokens_total[{RATE}]))"},
            "prompt: read; reused: of prompts that were in the KV cache; generated; wasted: computed for clients that had left.",
        ),
    ],
    "Sequences and the KV cache": [
        Panel(
            "Sequences that run, and that wait",
            "short",
            {
                "running": "sum(model_running and on (instance) model_kv_cache_capacity_tokens)",
                "waiting": "sum(model_queue_depth and on (instance) model_kv_cache_capacity_tokens)",
            },
            "As many as MAX_SEQUENCES run at once; the others wait for a slot of the KV cache.",
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            {"tokens": "sum(model_kv_cache_tokens) / sum(model_kv_cache_capacity_tokens)"},
            "Tokens of running sequences, of all that the slots have room for.",
            most=1,
        ),
        Panel(
            "Time of a step, by part",
            "percentunit",
            {
                "{{part}}": f"sum by (part) (rate(model_step_seconds_total[{RATE}])) "
                f"/ ignoring (part) group_left sum(rate(model_step_seconds_total[{RATE}]))"
            },
            "Share of plan and hand_out: what the loop takes beside the model.",
            most=1,
        ),
    ],
    "Saturation": [
        Panel(
            "Utilization of the instances",
            "percentunit",
            {
                "of their time": f"sum(rate(model_call_seconds_sum[{RATE}])) / sum(model_instances_loaded)",
                "GPU {{device}}": "max by (device) (gpu_busy_ratio)",
            },
            "At 100 % only more replicas or larger batches help.",
            most=1,
        ),
        Panel(
            "Memory",
            "bytes",
            {
                "{{instance}}": 'sum by (instance) (process_resident_memory_bytes{job="model"})',
                "GPU {{device}}": "max by (device) (gpu_memory_used_bytes)",
            },
            "The server with its model processes. Flat, once the longest inputs have been served.",
        ),
        Panel(
            "Processor, cores",
            "short",
            {"{{instance}}": f'sum by (instance) (rate(process_cpu_seconds_total{{job="model"}}[{RATE}]))'},
            "The server with its model processes.",
        ),
    ],
    "Instances and replicas": [
        Panel(
            "Instances of the model, and replicas",
            "short",
            {
                "instances": "sum(model_instances_loaded)",
                "ready for HAProxy": 'sum(haproxy_backend_active_servers{proxy="replicas"})',
            },
            "One that died is missing until it is replaced.",
        ),
        Panel(
            "Restarts",
            "short",
            {
                "model processes": "sum(increase(model_process_restarts_total[15m]))",
                "servers": 'sum(changes(process_start_time_seconds{job="model"}[15m]))',
            },
            "In the last 15 minutes.",
        ),
        Panel(
            "Replies of HAProxy to clients",
            "reqps",
            {
                "{{code}}": f'sum by (code) (rate(haproxy_frontend_http_responses_total{{proxy="clients"}}[{RATE}]))',
                "retried": f'sum(rate(haproxy_backend_retry_warnings_total{{proxy="replicas"}}[{RATE}]))',
            },
            "Fewer 5xx than the replicas' own: HAProxy retries once, on another replica.",
        ),
    ],
}
PANELS = [panel for panels in ROWS.values() for panel in panels]


def as_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """The panel as Grafana keeps it."""
    heatmap = panel.kind == "heatmap"
    own: dict[str, Any] = {
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                **({"max": panel.most} if panel.most else {}),
                "custom": {"fillOpacity": 10, "showPoints": "never"},
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }
    if heatmap:
        own = {"options": {"calculate": False, "color": {"scheme": "Blues"}, "yAxis": {"unit": panel.unit}}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": expr,
                "legendFormat": legend,
                "format": "heatmap" if heatmap and legend == "{{le}}" else "time_series",
            }
            for i, (legend, expr) in enumerate(panel.shows.items())
        ],
        **own,
    }


def dashboard() -> dict[str, Any]:
    """All of it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in ROWS.items():
        panels.append(
            {
                "id": 100 + y,
                "type": "row",
                "title": row,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        for i, panel in enumerate(members):
            panels.append(as_json(panel, len(panels), WIDTH * (i % ACROSS), y + 1))
        y += 1 + HEIGHT
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": "one-model",
        "title": "One model, one queue, one loop",
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "annotations": {"list": []},
        "panels": panels,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
