"""Gunicorn's gthread worker, which ends without resetting a connection or waiting for its own lock."""

from typing import Any

from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]


class Worker(ThreadWorker):  # type: ignore[misc]
    """Stops listening when it stops accepting."""

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        for listener in () if self.alive else self.sockets:
            n = -1
            while n != self.nr_conns:  # these have connected already: they are answered
                n = self.nr_conns
                self.accept(listener)
            listener.close()  # Gunicorn lets more of them connect, and resets them at its end

    def handle_quit(self, *signal: Any) -> None:
        # Not Gunicorn's own: it waits for a lock that the code it interrupts may hold.
        super(ThreadWorker, self).handle_quit(*signal)
