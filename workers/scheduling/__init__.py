"""Which jobs are admitted, how large a batch may be and how long it is held.

    cost_model.py     how long a call takes; warm_up.py: measured before the first request
    instances.py      when an instance of the model is free
    estimate.py       when a job would be answered, and how large a batch the jobs can afford
    admission.py      whether a request is admitted
    holding.py        how long a partial batch is held for more jobs; anticipation.py: how long that pays

Every number that is set by hand: what for, and what clients notice at a tenth and at ten times of it, in overload, bursts, noise,
stalls and giant jobs on a virtual clock (`python -m loadtests.plan.constants`). "-": nothing, that is less than 3 % of the answers,
20 % of the 99th percentile (p99) and 1 % of the admitted that end late. "?": not measured.

    number                  what for                                  a tenth                            ten times
    ------------------------------------------------------------------------------------------------------------------------------------
    STANDING_TARGETS = 2    an older queue is not a burst             p99 of 2x overload halves          p99 8 times as long
    ALLOWED_REQUESTS = 6    a slow model serves several clients       -                                  slow model: p99 4 -> 9 s
    ALLOWED_BATCHES = 1.5   a batch fills while another runs          -                                  slow model: p99 4 -> 9 s
    REJECTION_BATCHES = 20  rejections empty a queue, too             -                                  bursts: 5 % fewer answers
    HOPELESS_FACTOR = 2     a wrong cost model must be corrected      -                                  giants lock all others out
    RETRIAL_FACTOR = 20     giants get 1/20 of the model's time       -                                  -
    OUTSIZED = 20           one giant must not be the usual size      -                                  giants: p99 1.1 -> 6.2 s
    USUAL_SHARE = 0.05      the usual size: a mean of 20 jobs         giants: p99 1.1 -> 2.3 s           mixed sizes: 5 % more answers
    PAYS = 20               19/20 of what batching can give           large batches: 5 % fewer answers   -
    LIMIT_PART = 0.5        a job may miss one batch, not two         ?                                  ?
    ANY_SIZE_PART = 0.125   short calls may be as large as they like  ?                                  ?
    OUTLIER_FACTOR = 2.0    a pause of the machine is not a trend     noise: 51 % late, not 5 %          noise: 10 % late
    OUTLIER_STEP = 1.1      an outlier moves the law by 10 %          -                                  -
    RECENT_CALLS = 7        4 outliers are a trend, 3 are not         a stall: 1/4 of the answers        noise: 23 % late
    TYPICAL_CALLS = 5       the law follows within seconds            -                                  -
    ERROR_CALLS = 20        a margin that does not jump               -                                  noise: 8 % late
    MARGIN = 1.1            admitted jobs end in time                 tight limit: 48 % late, not 0      tight limit: 1/5 of the answers
    LEAST_SPREAD = 0.001    calls of one size show no slope           ?                                  ?
    LEAST_S = 1e-06         clocks of whole milliseconds              ?                                  ?
    WARM_UP_TURNS = 3       the fastest of three                      ?                                  ?
    WARM_UP_S = 3.0         a start must not take long                ?                                  ?
    OVERDUE_FACTOR = 5      a slow call does not hang                 giants: 39 % more answers          -
    OVERDUE_S = 1.0         the same, of a fast model                 a stall: 1 % late, not 5 %         -
    REMEMBERED_CALLS = 20   clients change their habits               a stall: 5 % more answers          -
    MIN_GAIN = 0.075        less is noise, and lengthens the tail     -                                  returning users: 1/2 of the answers
    ENOUGH = 0.98           the last client may not come back         ?                                  ?
    SHORTEST_HOLD_S = 1e-06 no timer is finer                         ?                                  ?
    FULL = 0.8              a full batch is refilled by its own       ?                                  ?
"""
