"""configs/accelerate: what `accelerate launch --config_file` understands, and what train_uda.py accepts."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from faults.arena import RUN, load_script

from t2sda_hf.config import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_a_launch_file_is_known_to_accelerate_and_not_refused_here(path: Path) -> None:
    launch = load_config_from_file(str(path))  # refuses unknown keys
    assert launch.mixed_precision in ("no", "bf16")
    assert launch.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
    assert launch.num_processes % launch.num_machines == 0
    assert (launch.num_processes > 1) == (launch.distributed_type == DistributedType.MULTI_GPU)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_is_refused_not_ignored(kind: DistributedType, tmp_path: Path) -> None:
    """Launched so, accelerate would shard nothing here and say nothing."""

    class Sharded:
        mixed_precision, gradient_accumulation_steps, distributed_type = "no", 1, kind
        wait_for_everyone = Accelerator.wait_for_everyone

    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{kind.value}.*whole student"):
        load_script().prepare(load_config(tmp_path / "run.yaml"), Sharded())
