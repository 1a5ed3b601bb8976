from loadtests.bench.overhead import main

if __name__ == "__main__":
    main()
