"""How often every network runs in a step: what a configuration costs, and that a weight of 0 costs nothing."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tiny import small_recipe, tiny_batch, tiny_config, tiny_graphs, tiny_networks
from torch import Tensor, nn

from t2sda_hf.config import RunConfig

DG = ("--method=generalization", "--translate.engine=color_jitter", "--drw.apply_to=none")
HRDA = (
    "--data={crop_size: [64, 128], outer_crop_size: [96, 192]}",
    "--hrda={enabled: true, crop_size: [32, 32]}",
)
SOURCE_ALONE = "--loss_weights={target: 0, pull: 0, masked_consistency: 0, feature_distance: 0}"
LATE = "--pull.start_step=5"
# Student's encoder, head and projector, teacher's encoder, frozen encoder, translations; in update 4 if nothing is
# said. With HRDA a labelled image passes encoder and head twice, as context and detail, and the teacher's nine details
# of an image are one forward of their own.
FORWARDS: dict[tuple[str, ...], tuple[int, int, int, int, int, int]] = {
    # source, mixed and pseudo-target images; both domains by the teacher
    (): (3, 2, 1, 2, 0, 1),
    ("--loss_weights.pull=0",): (2, 2, 0, 1, 0, 0),
    ("--loss_weights.target=0",): (2, 1, 1, 2, 0, 1),
    ("--loss_weights.source=0",): (2, 1, 1, 2, 0, 1),
    ("--loss_weights={source: 0, target: 0}",): (1, 0, 1, 2, 0, 1),
    ("--loss_weights={pull: 0, target: 0}",): (1, 1, 0, 0, 0, 0),
    ("--loss_weights.feature_distance=0.1",): (3, 2, 1, 2, 1, 1),
    ("--loss_weights={source: 0, feature_distance: 0.1}",): (3, 1, 1, 2, 1, 1),
    ("--loss_weights={masked_consistency: 1}",): (4, 3, 1, 2, 0, 1),
    ("--loss_weights={masked_consistency: 1, pull: 0}",): (3, 3, 0, 1, 0, 0),
    ("--loss_weights={masked_consistency: 1, pull: 0, target: 0}",): (2, 2, 0, 1, 0, 0),
    ("--loss_weights={masked_consistency: 1, pull: 0, target: 0, source: 0}",): (1, 1, 0, 1, 0, 0),
    (LATE,): (2, 2, 0, 1, 0, 1),
    (LATE, "update 5"): (3, 2, 1, 2, 0, 1),
    ("--pull.teacher_forward=joint",): (3, 2, 1, 1, 0, 1),
    ("--translate.engine=none",): (3, 2, 1, 2, 0, 0),
    ("--loss_weights.pull=0", "--mix.source=pseudo_target"): (2, 2, 0, 1, 0, 1),
    # directions of the pull: only the last one looks at a third kind of key
    ("--pull={query_domain: source, key_domain: source}",): (3, 2, 1, 2, 0, 0),
    ("--pull={query_domain: source, key_domain: target}",): (3, 2, 1, 2, 0, 0),
    ("--pull={query_domain: target, key_domain: source}",): (3, 2, 1, 2, 0, 0),
    ("--pull={query_domain: source, key_domain: ptarget}",): (3, 2, 1, 3, 0, 1),
    # the other methods
    ("--method=source_only",): (1, 1, 0, 0, 0, 0),
    DG: (2, 1, 1, 1, 0, 1),
    (*DG, "--loss_weights.pull=0"): (1, 1, 0, 0, 0, 0),
    (*DG, "--loss_weights.source=0"): (1, 0, 1, 1, 0, 1),
    (*DG, LATE): (1, 1, 0, 0, 0, 0),
    (*DG, LATE, "update 5"): (2, 1, 1, 1, 0, 1),
    (*DG, "--translate.engine=none"): (2, 1, 1, 1, 0, 0),
    (*DG, "--pull={query_domain: source, key_domain: ptarget}"): (2, 1, 1, 2, 0, 1),
    # two resolutions
    HRDA: (5, 4, 1, 3, 0, 1),
    (*HRDA, "--loss_weights.pull=0"): (4, 4, 0, 2, 0, 0),
    (*HRDA, "--loss_weights={source: 0, pull: 0, target: 0, feature_distance: 0.1}"): (1, 0, 0, 0, 1, 0),
    (*HRDA, "--hrda.crops_at_once=20"): (5, 4, 1, 5, 0, 1),
    # the recipes, and what remains of them when all weights but that of the source are 0
    **{
        (f"{folder}/{name}", *weights): counts
        for folder in ("gta_cityscapes", "synthia_cityscapes")
        for (name, *weights), counts in {
            ("source_only",): (1, 1, 0, 0, 0, 0),
            ("daformer",): (2, 2, 0, 1, 1, 0),
            ("t2sda_daformer",): (3, 2, 1, 2, 1, 1),
            ("dacs_deeplabv2",): (2, 2, 0, 1, 1, 0),
            ("t2sda_deeplabv2",): (3, 2, 1, 2, 1, 1),
            ("hrda",): (4, 4, 0, 2, 1, 0),
            ("t2sda_hrda",): (5, 4, 1, 3, 1, 1),
            ("mic",): (6, 6, 0, 2, 1, 0),
            ("t2sda_mic",): (7, 6, 1, 3, 1, 1),
            ("t2sda_daformer", SOURCE_ALONE): (1, 1, 0, 0, 0, 0),
            ("t2sda_deeplabv2", SOURCE_ALONE): (1, 1, 0, 0, 0, 0),
            ("t2sda_mic", SOURCE_ALONE): (2, 2, 0, 0, 0, 0),
        }.items()
    },
}


def config(case: tuple[str, ...]) -> RunConfig:
    overrides = [word for word in case if word.startswith("--")]
    if case and case[0].count("/"):
        return small_recipe(*case[0].split("/"), *overrides)
    return tiny_config(*overrides)


@pytest.mark.parametrize("case", FORWARDS, ids=lambda case: " ".join(case) or "default")
def test_every_network_runs_as_often_as_the_table_says(case: tuple[str, ...]) -> None:
    cfg = config(case)
    networks, calls = tiny_networks(cfg), Counter[str]()

    def count(name: str, network: nn.Module | None) -> None:
        if network is not None:
            network.register_forward_hook(lambda *_: calls.update([name]))

    student = networks.student
    count("student", student.encoder)
    count("head", student.decode_head)
    count("projector", student.projector)
    count("teacher", networks.teacher.encoder)
    count("imagenet", networks.imagenet)

    def translate(*given: Any) -> Tensor:
        calls.update(["translate"])
        return networks.translate(*given)

    batch = tiny_batch(cfg)
    if cfg.method == "generalization":
        batch = replace(batch, target_images=None, outer_source=None, style_reference=None)
    list(tiny_graphs(cfg, replace(networks, translate=translate), batch, index=5 if "update 5" in case else 4))
    names = ("student", "head", "projector", "teacher", "imagenet", "translate")
    assert tuple(calls[name] for name in names) == FORWARDS[case]
