"""Triton's embedded Python 3.11 is older than the standard library that it finds here; a lock lacks what that asks of it."""

import threading
from multiprocessing import resource_tracker

if not hasattr(threading.RLock(), "_recursion_count"):
    resource_tracker._resource_tracker._lock = threading._PyRLock()
