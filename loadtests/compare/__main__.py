"""Every deployment mode through the same scenarios."""

from loadtests import arguments
from loadtests.compare.run import main

if __name__ == "__main__":
    arguments.run(main)
