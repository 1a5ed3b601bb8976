from loadtests.compare.run import main

if __name__ == "__main__":
    main()
