"""The fault campaign: every fault so often, one table.   make faults   [ARGS="--sample", "--only kill signal"]

    python tests/faults/campaign.py [--sample] [--only WORD ...] [--most N] [--seed N]

Exit code 0 if nothing was lost, mixed or silent.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import attacks  # noqa: E402
import ends  # noqa: E402
import rows  # noqa: E402
from rows import Row, Yard  # noqa: E402

# Row, trials of the campaign, trials of the sample in the normal test set.
TABLE: list[tuple[Callable[[Yard, int], Row], int, int]] = [
    (rows.kills_anywhere, 50, 1),
    (rows.kills_in_the_save, 50, 1),
    (rows.kills_in_the_retention, 25, 0),
    (rows.kills_in_either_phase, 10, 0),
    (rows.resume_matrix, 48, 0),
    (rows.late_start, 2, 0),
    (rows.damages, 200, 40),
    (rows.disk_full, 40, 1),
    (rows.really_full, 20, 0),
    (rows.signals, 40, 1),
    (rows.second_signals, 4, 1),
    (rows.not_finite, 15, 2),
    (rows.not_finite_in_one, 4, 0),
    (rows.two_killed, 10, 1),
    (rows.two_frozen, 4, 0),
    (rows.two_stopped, 4, 1),
    (rows.two_sharded, 4, 0),  # tests/test_two_processes.py has one
    (rows.two_saves, 100, 5),
    (rows.parallel_starts, 20, 3),
    (rows.clocks, 4, 0),
    # Of those without trials in the sample tests/test_resume.py and tests/test_tables_command.py have one.
    (ends.workers_killed, 10, 0),
    (ends.files_vanish, 10, 0),
    (ends.hang_ups, 10, 0),
    (ends.slurm_signals, 10, 0),
    (ends.broken_pipes, 6, 0),
    (ends.launchers_ended, 6, 0),
    (ends.foreign_runs, 6, 0),
    (ends.cluster_disks, 9, 0),
    (ends.full_at_the_start, 8, 0),
    (ends.exchanged_data, 6, 0),
    (ends.cells_outside, 12, 12),
    (ends.damaged_caches, 30, 6),
    (attacks.payloads, 12, 4),
    (attacks.escapes, 15, 15),
    (attacks.cells, 20, 4),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="a few of each, as in the normal test set")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="rows whose name has one of these")
    parser.add_argument("--most", type=int, help="no row more often than this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    done: list[tuple[Row, float]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yard = Yard(Path(folder), options.seed)
        for run, many, few in TABLE:
            trials = few if options.sample else many if options.most is None else min(many, options.most)
            if trials and any(word in run.__name__ for word in options.only):
                begun = time.monotonic()
                row = run(yard, trials)
                done.append((row, time.monotonic() - begun))
                print(line(row, done[-1][1]), flush=True)
                for note in row.notes:
                    print(f"    {note}", flush=True)
    total = Row(
        "all", *(sum(getattr(row, key) for row, _ in done) for key in ("tried", "survived", "lost", "mixed", "silent"))
    )
    print("\n| fault | tried | survived | lost | mixed | silent | seconds |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row, seconds in [*done, (total, sum(seconds for _, seconds in done))]:
        print(line(row, seconds))
    return int(total.survived != total.tried or not total.tried)


def line(row: Row, seconds: float) -> str:
    return f"| {row.fault} | {row.tried} | {row.survived} | {row.lost} | {row.mixed} | {row.silent} | {seconds:.0f} |"


if __name__ == "__main__":
    sys.exit(main())
