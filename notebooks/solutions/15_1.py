"""R + the root of R."""

import math

answer = math.ceil(90 + math.sqrt(90))
