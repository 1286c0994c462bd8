"""configs/accelerate: what `accelerate launch --config_file` understands, and what `t2sda train` accepts."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from faults.arena import RUN

from t2sda_hf.commands.train import prepare
from t2sda_hf.config import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_a_launch_file_is_known_to_accelerate_and_not_refused_here(path: Path) -> None:
    launch = load_config_from_file(str(path))  # refuses unknown keys
    assert launch.mixed_precision in ("no", "bf16")
    assert launch.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.FSDP)
    assert launch.num_processes % launch.num_machines == 0
    assert (launch.num_processes > 1) == (launch.distributed_type != DistributedType.NO)
    assert (launch.fsdp_config or {}).get("fsdp_version", 2) == 2


@pytest.mark.parametrize(
    ("kind", "variables", "said"),
    [
        (DistributedType.DEEPSPEED, {}, "DEEPSPEED.*FSDP2"),
        (DistributedType.FSDP, {"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        (DistributedType.MULTI_CPU, {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (DistributedType.FSDP, {"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set model.activation"),
    ],
)
def test_sharding_of_another_kind_is_refused_not_ignored(
    kind: DistributedType, variables: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sharded:
        mixed_precision, gradient_accumulation_steps, distributed_type, num_processes = "no", 1, kind, 2
        wait_for_everyone = Accelerator.wait_for_everyone

    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        prepare(load_config(tmp_path / "run.yaml"), Sharded())
