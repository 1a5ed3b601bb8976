"""Who is admitted, and how large a batch may be: a cost model, an estimate of the wait, the decision."""
