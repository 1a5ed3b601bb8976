from loadtests.plan.planner import main

if __name__ == "__main__":
    main()
