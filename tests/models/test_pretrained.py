import json
import logging as python_logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)
from transformers.utils import logging

from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation, load_pretrained_encoder

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 14387832\n"


@pytest.fixture
def model(tiny) -> T2SDAForSemanticSegmentation:
    """The one that receives weights: another head, and other dropout, than the checkpoints below."""
    torch.manual_seed(1)
    config = T2SDAConfig(**(tiny | {"num_labels": 3}), projector_dim=8, projector_hidden=8, drop_path_rate=0.3)
    return T2SDAForSemanticSegmentation(config)


@pytest.fixture
def source(tiny, randomize) -> SegformerModel:
    """The encoder that all checkpoints below hold."""
    return randomize(SegformerModel(SegformerConfig(**tiny)))


@pytest.fixture
def folder(source, tmp_path) -> Path:
    """`source` as transformers saves it."""
    source.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def copy_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_tensors(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    tensors = module.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def assert_refused(model: T2SDAForSemanticSegmentation, name_or_path, message: str, **hub_kwargs) -> None:
    """ValueError with that message, every tensor as before, and transformers as loud as before."""
    before = copy_tensors(model)
    level = logging.get_verbosity()
    with pytest.raises(ValueError, match=message):
        load_pretrained_encoder(model, name_or_path, **hub_kwargs)
    assert_tensors(model, before)
    assert logging.get_verbosity() == level


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What is loaded


@pytest.mark.parametrize("kind", ["encoder", "classifier", "segmenter", "t2sda"])
@pytest.mark.parametrize("save_original_format", [True, False])
def test_the_encoder_of_every_kind_of_checkpoint(model, source, tiny, tmp_path, kind, save_original_format):
    holder = {
        "encoder": lambda: source,
        "classifier": lambda: SegformerForImageClassification(SegformerConfig(**(tiny | {"num_labels": 1000}))),
        "segmenter": lambda: SegformerForSemanticSegmentation(SegformerConfig(**(tiny | {"num_labels": 150}))),
        "t2sda": lambda: T2SDAForSemanticSegmentation(T2SDAConfig(**tiny, projector_dim=4, head="all_mlp")),
    }[kind]()
    if holder is not source:
        holder.segformer.load_state_dict(source.state_dict())
    holder.save_pretrained(tmp_path, save_original_format=save_original_format)
    head, projector = copy_tensors(model.decode_head), copy_tensors(model.projector)

    load_pretrained_encoder(model, tmp_path)

    assert_tensors(model.segformer, source.state_dict())
    assert_tensors(model.decode_head, head)
    assert_tensors(model.projector, projector)


@pytest.mark.parametrize("model_class", [SegformerForImageClassification, SegformerForSemanticSegmentation])
def test_files_with_the_names_and_the_config_of_the_hub(model, source, tiny, write_hub_files, model_class):
    holder = model_class(SegformerConfig(**tiny))
    holder.segformer.load_state_dict(source.state_dict())

    load_pretrained_encoder(model, str(write_hub_files(holder)))

    assert_tensors(model.segformer, source.state_dict())


def test_a_hub_id_with_settings_for_the_hub(model, source, tmp_path):
    """A cache as downloads leave it: the folder, the revision and "no network" must all reach transformers."""
    repository = tmp_path / "models--someone--tiny"
    source.save_pretrained(repository / "snapshots" / ("5" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "tested").write_text("5" * 40)

    load_pretrained_encoder(model, "someone/tiny", cache_dir=tmp_path, revision="tested", local_files_only=True)

    assert_tensors(model.segformer, source.state_dict())


def test_files_of_torch_save(model, source, folder):
    """Older checkpoints on the Hub have no safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    load_pretrained_encoder(model, folder)

    assert_tensors(model.segformer, source.state_dict())


def test_the_models_own_settings_stay(model, folder, images):
    """Weights only: drop path 0.3 and eps 1e-6 are the model's, 0.1 and 1e-5 what the checkpoint was made with."""
    fields = model.config.to_dict()

    load_pretrained_encoder(model, folder)

    assert model.config.to_dict() == fields
    assert model.training
    last = model.segformer.stages[3]
    assert last.blocks[0].drop_path.drop_prob == pytest.approx(0.3)
    assert last.layer_norm.eps == last.blocks[0].layernorm_before.eps == 1e-6
    assert last.patch_embeddings.layer_norm.eps == 1e-5


def test_the_encoder_is_the_checkpoints_function(model, source, folder, images):
    plain = T2SDAForSemanticSegmentation(T2SDAConfig(**(model.config.to_dict() | {"encoder_ln_eps_fix": False})))

    load_pretrained_encoder(plain, folder)

    ours = plain.eval()(images, segment=False, output_hidden_states=True).hidden_states
    theirs = source.eval()(images, output_hidden_states=True).hidden_states
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_copies_do_not_share_memory_with_each_other_or_the_files(model, source, folder, tiny):
    other = T2SDAForSemanticSegmentation(T2SDAConfig(**tiny))
    load_pretrained_encoder(model, folder)
    load_pretrained_encoder(other, folder)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    shutil.rmtree(folder)

    assert_tensors(other.segformer, source.state_dict())
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize(("theirs", "ours"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_weights_take_the_dtype_of_the_model(model, source, tmp_path, theirs, ours):
    source.to(theirs).save_pretrained(tmp_path)
    model.to(ours)

    load_pretrained_encoder(model, tmp_path)

    assert {parameter.dtype for parameter in model.parameters()} == {ours}
    assert_tensors(model.segformer, {name: tensor.to(ours) for name, tensor in source.state_dict().items()})


def test_fields_without_a_say_in_the_encoders_tensors_may_differ(model, folder):
    edit_config(folder, decoder_hidden_size=768, drop_path_rate=0.0, layer_norm_eps=1e-5, initializer_range=1.0)

    load_pretrained_encoder(model, folder)


# Silence


@pytest.mark.parametrize("level", [python_logging.INFO, python_logging.WARNING, python_logging.ERROR])
def test_transformers_is_as_loud_as_before(model, folder, level):
    before = logging.get_verbosity()
    logging.set_verbosity(level)
    try:
        load_pretrained_encoder(model, folder)
        assert logging.get_verbosity() == level
        assert_refused(model, folder / "nothing", "no checkpoint")
        (folder / "model.safetensors").unlink()
        assert_refused(model, folder, "no weights")
    finally:
        logging.set_verbosity(before)


def test_an_unwanted_head_is_not_reported(model, tiny, tmp_path, caplog):
    SegformerForSemanticSegmentation(SegformerConfig(**tiny)).save_pretrained(tmp_path)
    caplog.clear()

    with caplog.at_level(python_logging.WARNING, logger="transformers"):
        load_pretrained_encoder(model, tmp_path)

    assert not caplog.records


# What is refused


def test_no_folder(model, tmp_path):
    assert_refused(model, tmp_path / "mit-b5", r"no checkpoint at '.*mit-b5': .* Check the spelling")
    assert_refused(model, str(tmp_path / "mit-b5"), r"no checkpoint at '.*mit-b5'")


def test_a_hub_id_that_is_not_at_hand(model, tmp_path):
    """Settings for the Hub reach transformers: with these it looks into an empty folder, and nowhere else."""
    assert_refused(
        model,
        "nvidia/mit-b5",
        "no checkpoint at 'nvidia/mit-b5': .* the connection",
        local_files_only=True,
        cache_dir=tmp_path,
    )


def test_a_folder_without_config(model, folder):
    (folder / "config.json").unlink()

    assert_refused(model, folder, "has no config.json that names its model_type. Give a SegFormer")


def test_a_config_that_is_no_json(model, folder):
    (folder / "config.json").write_text('{"model_type": "segformer",')

    assert_refused(model, folder, "no checkpoint at .* not a valid JSON file")


def test_a_config_that_does_not_say_what_it_is(model, folder):
    (folder / "config.json").write_text('{"hidden_sizes": [8, 16, 24, 32]}')

    assert_refused(model, folder, "has no config.json that names its model_type")


def test_another_kind_of_model(model, tmp_path):
    BertConfig().save_pretrained(tmp_path)

    assert_refused(model, tmp_path, "is a 'bert' model, which has no Mix Transformer encoder")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_sizes", [8, 16, 24, 64]),
        ("depths", [1, 1, 2, 1]),
        ("num_attention_heads", [1, 2, 3, 8]),
        ("sr_ratios", [4, 4, 2, 1]),
        ("patch_sizes", [3, 3, 3, 3]),
        ("strides", [2, 2, 2, 2]),
        ("mlp_ratios", [4, 4, 4, 2]),
        ("num_channels", 1),
        ("hidden_act", "relu"),
    ],
)
def test_an_encoder_of_other_sizes(model, tiny, tmp_path, field, value):
    """Also where every tensor would fit: heads, strides and activation leave no trace in the shapes."""
    SegformerModel(SegformerConfig(**(tiny | {field: value}))).save_pretrained(tmp_path)
    ours = getattr(model.config, field)
    ours = list(ours) if isinstance(ours, tuple) else ours

    assert_refused(model, tmp_path, re.escape(f"differs from the model's: {field} {value}, the model has {ours}. "))


def test_all_differences_are_named_at_once(model, tiny, tmp_path):
    sizes = {"hidden_sizes": [4, 8, 12, 16], "depths": [2, 2, 2, 2]}
    SegformerModel(SegformerConfig(**(tiny | sizes))).save_pretrained(tmp_path)

    assert_refused(model, tmp_path, r"depths \[2, 2, 2, 2\].*; hidden_sizes \[4, 8, 12, 16\].*from_size")


@pytest.mark.parametrize(
    ("dropped", "count"),
    [("encoder.block.3.0.attention.self.key.bias", 1), ("patch_embeddings.0", 4), ("encoder.block", 84)],
)
def test_tensors_that_are_missing(model, folder, dropped, count):
    edit_tensors(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if dropped not in name})

    assert_refused(model, folder, rf"does not hold the whole encoder: of 108 tensors, {count} missing \(stages\.")


def test_tensors_of_another_shape(model, folder):
    """The config.json fits, the file does not: the wrong one of two files in a folder."""
    name = "encoder.layer_norm.2.weight"
    edit_tensors(folder, lambda tensors: tensors | {name: torch.ones(25)})

    assert_refused(model, folder, r"of 108 tensors, 1 of another shape \(.*stages\.2\.layer_norm\.weight.*25")


def test_tensors_missing_and_of_another_shape(model, folder):
    def edit(tensors):
        tensors = tensors | {"encoder.layer_norm.2.weight": torch.ones(25)}
        del tensors["encoder.layer_norm.2.bias"]
        return tensors

    edit_tensors(folder, edit)

    assert_refused(model, folder, r"1 missing \(stages\.2\.layer_norm\.bias\) and 1 of another shape")


def test_the_names_of_other_code(model, folder):
    """DAFormer's own MiT files call the same tensors block1.0.norm1 and so on."""
    edit_tensors(folder, lambda tensors: {f"block1.{index}": tensor for index, tensor in enumerate(tensors.values())})

    assert_refused(model, folder, r"108 missing \(.* and 103 more\).*checkpoints of other code must be converted")


def test_no_weights(model, folder):
    (folder / "model.safetensors").unlink()

    assert_refused(model, folder, r"has a config\.json, but no weights that can be read.*model\.safetensors")


@pytest.mark.parametrize("content", [LFS_POINTER, b"", "half"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read(model, folder, name, content):
    """A clone without Git LFS, and downloads that stopped."""
    if name == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content)

    assert_refused(model, folder, r"no weights that can be read\. Fetch the files again\. \(\w+Error: ")


class Payload:
    """Unpickling it would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_code_in_a_pickle_does_not_run(model, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"encoder.layer_norm.0.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")

    assert_refused(model, folder, "no weights that can be read")
    assert not (tmp_path / "ran").exists()
