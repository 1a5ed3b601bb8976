"""What a setting or a fleet will do, from the real scheduler on a virtual clock."""

from loadtests import arguments
from loadtests.plan import generation, planner
from workers.settings import Settings


def main() -> int:
    """Plan for the task that the settings name: sequences where text is generated token by token, batches elsewhere."""
    return generation.main() if Settings.read().is_token_by_token else planner.main()


if __name__ == "__main__":
    arguments.run(main)
