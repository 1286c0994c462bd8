"""Run by test_two_processes.py under accelerate: every process writes what it computed from its share of a batch."""

import json
import math
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from two_process_case import case, share_of, statistics

from t2sda_hf.config import RunConfig
from t2sda_hf.data.contents import Contents
from t2sda_hf.training import distributed
from t2sda_hf.training.resume import check_agreement


def refusal(cfg: RunConfig, images: list[str], accelerator: Accelerator) -> str:
    """What a run says at its start that reads these images; "" if all processes agree."""
    contents = {"target_data": Contents("images", ["a.png", "b.png"], images)}
    try:
        check_agreement(cfg, {cfg.method: {"versions": {"torch": torch.__version__}}}, contents, accelerator)
    except ValueError as error:
        return str(error)
    return ""


def slowly(accelerator: Accelerator) -> list[object]:
    """What all hear of work that takes the main process several signs of life, and of whose numbers are finite."""
    heard, enough, largest = [], threading.Event(), distributed.largest

    def counted(value: int, accelerator: Accelerator) -> int:
        heard.append(value)
        if len(heard) == 3:
            enough.set()
        return largest(value, accelerator)

    distributed.largest, distributed.SIGN_OF_LIFE = counted, 0.01
    done = distributed.done_by_main(lambda: enough.wait(60) and "done", accelerator)
    distributed.largest = largest
    number = torch.tensor([1.0, math.inf][accelerator.process_index])
    finite = [distributed.all_finite([number, one], accelerator) for one in (torch.ones(()), -number)]
    return [done, len(heard) > 3, *finite, distributed.all_finite([torch.ones(())], accelerator)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    cfg, arrays = case()
    share = share_of(arrays, accelerator.process_index, accelerator.num_processes)
    result = statistics(share, cfg, accelerator.reduce)
    other_cfg = replace(cfg, drw=replace(cfg.drw, absent_conf="mean"))
    result["importance_mean"] = statistics(share, other_cfg, accelerator.reduce)["importance"]
    result["num_processes"] = torch.tensor(accelerator.num_processes)
    torch.save(result, Path(sys.argv[1]) / f"rank{accelerator.process_index}.pt")
    rank, same = accelerator.process_index, ["0" * 64, "1" * 64]
    own_place = replace(cfg, output_dir=f"out_{rank}", target=replace(cfg.target, path=f"disk_{rank}/photos"))
    said = [
        refusal(own_place, same, accelerator),
        refusal(replace(cfg, seed=rank, optim=replace(cfg.optim, lr=(1 + rank) * 1e-3)), same, accelerator),
        refusal(cfg, ["0" * 64, f"{1 + rank}" * 64], accelerator),
    ]
    (Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps([*said, slowly(accelerator)]))
    accelerator.end_training()
