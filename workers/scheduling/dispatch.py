"""When a batch is due. Greedy, or work-conserving, batching: as soon as the model is free and a job waits."""

from collections.abc import Callable

from workers.jobs import Job, JobQueue
from workers.scheduling.estimate import WaitEstimate
from workers.scheduling.instances import Instances


class Greedy:
    """Tells the loop when to take a batch. `on_held` hears of each hold, its seconds and how many jobs joined: here of none."""

    def __init__(
        self,
        queue: JobQueue,
        estimate: WaitEstimate,
        instances: Instances,
        on_held: Callable[[float, int], None],
    ) -> None:
        self.queue, self.estimate, self.instances = queue, estimate, instances
        self.on_held = on_held
        self.closing = False

    async def due(self) -> str:
        """Wait until a batch is due; return why. Its jobs stay in the queue: their clients may still leave."""
        await self.queue.not_empty()
        return self.reason()

    def reason(self) -> str:
        """Return why a batch of what has queued is due now."""
        if len(self.queue) >= self.estimate.batch_size:
            return "full"
        return "draining" if self.closing else "empty"

    def arrived(self, jobs: list[Job]) -> None:
        """Note that the jobs of one request were admitted."""

    def answered(self, batch: list[Job], call_s: float) -> None:
        """Note that a call of `call_s` has succeeded; its batch is answered next."""

    def changed(self) -> None:
        """Note that a job has left the queue, or that an instance is free."""

    def close(self) -> None:
        """From now on every batch is due at once."""
        self.closing = True
        self.changed()
