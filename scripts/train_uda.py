"""`t2sda train`, for those who launch a script of a checkout: accelerate launch scripts/train_uda.py --config demo"""

import sys

from t2sda_hf.cli import main
from t2sda_hf.masking import run_masked

if __name__ == "__main__":
    sys.exit(run_masked(lambda: main(["train", *(sys.argv[1:] or ["--help"])], door="scripts/train_uda.py")))
