"""One thread a process: the models of the tests are so small that threads only wait for each other. (Before torch is
imported; what a test starts inherits it.)"""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
