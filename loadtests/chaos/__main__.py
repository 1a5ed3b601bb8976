from loadtests import arguments
from loadtests.chaos.run import main

if __name__ == "__main__":
    arguments.run(main)
