"""What the server adds to its model."""

from loadtests import arguments
from loadtests.bench.overhead import main

if __name__ == "__main__":
    arguments.run(main)
