"""What a setting or a fleet will do, from the real scheduler on a virtual clock."""

from loadtests import arguments
from loadtests.plan.planner import main

if __name__ == "__main__":
    arguments.run(main)
