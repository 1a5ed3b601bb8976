"""MODEL=notebooks.support.l12_sleeper:Sleeper: it loads as long as the embedded model, and then takes 20 ms a call.

It computes nothing, so several replicas share a machine without slowing each other: as if each had a machine of its own.
"""

from loadtests.bench.apps import Sleeps
from workers import tasks
from workers.settings import Settings


class Sleeper(Sleeps):
    def __init__(self) -> None:
        tasks.load_alone(Settings())
