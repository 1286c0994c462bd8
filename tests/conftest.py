"""Set before torch is loaded: threads that wait by spinning make tests many times slower on a shared machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
