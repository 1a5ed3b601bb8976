"""Where Prometheus finds each replica: through the proxy /metrics is a random one's.

$ while python -m deploy.ray_targets > new.json && mv new.json targets.json; do sleep 10; done
  # prometheus.yml: scrape_configs: [{job_name: models, file_sd_configs: [{files: [targets.json]}]}]

Behind HAProxy only (deploy/ray.env): behind Serve's own proxy a replica has no port. Ray's metrics of itself: see its docs.
"""

import json
import os
import urllib.request
from typing import Any


def targets() -> list[dict[str, Any]]:
    """Each application's replicas, in the form of Prometheus' file_sd."""
    address = os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265")
    token = {"Authorization": f"Bearer {os.environ.get('RAY_AUTH_TOKEN', '')}"}
    ask = urllib.request.Request(f"{address}/api/serve/applications/", headers=token)
    with urllib.request.urlopen(ask, timeout=10) as reply:
        groups = json.load(reply)["target_groups"]
    return [
        {
            "targets": [f"{target['ip']}:{target['port']}" for target in group["targets"]],
            "labels": {
                "application": group["app_name"],
                "__metrics_path__": f"{group['route_prefix'].rstrip('/')}/metrics",
            },
        }
        for group in groups
        if group["protocol"] == "HTTP"
    ]


if __name__ == "__main__":
    print(json.dumps(targets(), indent=2))
