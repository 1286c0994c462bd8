"""`python -m t2sda_hf` is the command `t2sda`, also for launchers that want a module."""

from .cli import entry

if __name__ == "__main__":
    entry()
