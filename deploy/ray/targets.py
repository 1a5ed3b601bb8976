"""Where Prometheus finds each replica: through the proxy /metrics is a random one's. Behind deploy/ray/ray.env only.

$ python -m deploy.ray.targets targets.json  # again every 10 s; without a file once, to the terminal
  # prometheus.yml: scrape_configs: [{job_name: models, file_sd_configs: [{files: [targets.json]}]}]
"""

import json
import os
import sys
import time
from typing import Any

import ray


def targets() -> list[dict[str, Any]]:
    """Each application's replicas, in the form of Prometheus' file_sd."""
    controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    groups = ray.get(controller.get_target_groups.remote(from_proxy_manager=True))  # what HAProxy is told
    return [
        {
            "targets": [f"{target.ip}:{target.port}" for target in group.targets],
            "labels": {
                "application": group.app_name,
                "__metrics_path__": f"{group.route_prefix.rstrip('/')}/metrics",
            },
        }
        for group in groups
        if group.protocol == "HTTP"
    ]


def main() -> None:
    ray.init("auto", log_to_driver=False, logging_level="error")
    while sys.argv[1:]:
        with open(new := f"{sys.argv[1]}.new", "w") as file:
            json.dump(targets(), file, indent=2)
        os.replace(new, sys.argv[1])
        time.sleep(10)
    print(json.dumps(targets(), indent=2))


if __name__ == "__main__":
    main()
