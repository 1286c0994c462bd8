"""Run by test_two_processes.py under accelerate: every process writes what it computed from its share of a batch."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from two_process_case import case, share_of, statistics

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
    accelerator.end_training()
