"""Three seconds of work come each second, and a device may do four fifths of one."""

import math

answer = math.ceil(50 * 0.060 / 0.8)
