"""As many as the load needs, and one to spare."""

import math


def replicas_wanted(rate_per_s, one_per_s):
    return math.ceil(rate_per_s / one_per_s) + 1


answer = replicas_wanted
