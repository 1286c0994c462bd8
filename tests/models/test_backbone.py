"""Any backbone of transformers as the encoder: its levels, every size of image, and its files."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoders import ANY_SIZE, FAMILIES, HIERARCHICAL, PLAIN, write_encoder
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification, BertConfig, Dinov2Config, HGNetV2Config, PreTrainedConfig

from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation, encoder_fields, load_pretrained_encoder
from t2sda_hf.models.backbone import ChannelLayerNorm, Pyramid, measure_levels


def build(config: PreTrainedConfig, seed: int = 0, **fields) -> T2SDAForSemanticSegmentation:
    """An evaluated network on a backbone. Its classifier is large, so that differences of its logits show."""
    torch.manual_seed(seed)
    sizes = {"decoder_hidden_size": 8, "projector_dim": 8, "projector_hidden": 8, "num_labels": 5}
    model = T2SDAForSemanticSegmentation(T2SDAConfig(backbone_config=config, **(sizes | fields))).eval()
    model.decode_head.classifier.weight.data *= 100
    return model


@torch.no_grad()
def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).logits


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


# Levels


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_have_strides_of_4_to_32_and_the_channels_that_are_delivered(family):
    model = build(FAMILIES[family])
    with torch.no_grad():
        output = model(noise(64, 64), project=True, output_hidden_states=True)

    assert [level.shape[2:] for level in output.hidden_states] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert tuple(level.shape[1] for level in output.hidden_states) == tuple(model.config.hidden_sizes)
    assert output.logits.shape == (1, 5, 16, 16)
    assert output.embeddings.shape == (1, 8, 16, 16)


def test_a_wrong_number_of_channels_in_the_code_of_transformers_is_not_believed():
    levels = measure_levels(HGNetV2Config())
    assert levels.channels[0] == 128  # `HGNetV2Backbone.channels` says 256
    assert (levels.strides, levels.only_size) == ((4, 8, 16, 32), None)


def test_of_a_stage_that_ends_with_its_downsampling_the_map_before_it_is_read():
    """FocalNet's maps have strides 4 (before the first stage), 8, 16, 32 and 32: the last one of each is read."""
    assert measure_levels(FAMILIES["focalnet"]).out_indices == (0, 1, 2, 4)
    assert measure_levels(FAMILIES["pvt_v2"]).out_indices == (0, 1, 2, 3)  # has no map before the first stage
    assert measure_levels(FAMILIES["swin"]).out_indices == (1, 2, 3, 4)


def test_of_a_plain_encoder_the_ends_of_its_quarters_are_read_or_the_layers_that_are_named():
    config = Dinov2Config(hidden_size=16, num_attention_heads=2, num_hidden_layers=12, patch_size=14, image_size=56)
    assert measure_levels(config).out_indices == (3, 6, 9, 12)
    assert measure_levels(config, (4, 6, 8, 12)).out_indices == (4, 6, 8, 12)
    assert measure_levels(config, (12,)).out_indices == (12,)
    assert config.out_indices == [12]  # transformers' own, not changed


def test_one_layer_feeds_all_levels():
    model = build(PLAIN["dinov2"], out_layers=(4,))
    with torch.no_grad():
        output = model(noise(64, 64), output_hidden_states=True)
        tokens = model.backbone.model(F.pad(noise(64, 64), (0, 6, 0, 6))).feature_maps
    assert len(tokens) == 1
    third = F.interpolate(tokens[0], scale_factor=14 / 16, mode="bilinear")[..., :4, :4]
    torch.testing.assert_close(output.hidden_states[2], third)
    torch.testing.assert_close(output.hidden_states[3], F.max_pool2d(third, 2))


def test_levels_of_a_patch_of_14_lie_where_those_of_16_would():
    """A map that rises linearly with the place is resampled to the places of the cells of 16 pixels, exactly."""
    pyramid = Pyramid(4, 14)
    centres = (torch.arange(37) + 0.5) * 14
    maps = centres.expand(1, 4, 37, 37)

    third = pyramid([maps], (512, 512))[2]

    assert third.shape == (1, 4, 32, 32)
    torch.testing.assert_close(third[0, 0, 0], (torch.arange(32) + 0.5) * 16)


def test_the_norm_of_a_pyramid_is_over_channels():
    maps = torch.randn(2, 8, 3, 5) * 3 + 1
    out = ChannelLayerNorm(8, eps=0.0)(maps)
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 3, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.var(1, correction=0), torch.ones(2, 3, 5))


def test_the_linear_head_is_a_1x1_convolution_of_all_levels():
    model = build(HIERARCHICAL["convnext"], head="linear", classifier_dropout_prob=0.0)
    images = noise(64, 96)
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        expected = model.decode_head.classifier(model.decode_head.penultimate(output.hidden_states))
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in model.decode_head.parameters()) == 5 * (80 + 1) + 2 * 80


# Sizes


@pytest.mark.parametrize("family", ANY_SIZE)
def test_no_row_is_lost_and_the_padding_says_nothing(family):
    """What a patch or a stage does not fill is padded, not dropped: the same image padded by hand gives the same."""
    model = build(ANY_SIZE[family])
    images = noise(75, 131)
    found = logits(model, images)

    assert found.shape == (1, 5, 19, 33)
    assert torch.equal(found, logits(model, F.pad(images, (0, 29, 0, 21)))[..., :19, :33])
    changed = images.clone()
    changed[..., -3:, :] += 1
    assert (logits(model, changed) - found)[..., -1, :].abs().max() > 1e-4
    changed = images.clone()
    changed[..., -3:] += 1
    assert (logits(model, changed) - found)[..., -1].abs().max() > 1e-4


@pytest.mark.parametrize("family", ANY_SIZE)
def test_the_smallest_image(family):
    assert logits(build(ANY_SIZE[family]), noise(1, 1)).shape == (1, 5, 1, 1)


@pytest.mark.parametrize("family", ["dinov2", "convnext"])
@pytest.mark.parametrize("size", [(512, 1024), (1024, 2048)])
def test_the_sizes_of_cityscapes(family, size):
    assert logits(build(ANY_SIZE[family]), noise(*size)).shape == (1, 5, size[0] // 4, size[1] // 4)


def test_an_encoder_of_one_size_says_which():
    model = build(FAMILIES["hiera"])
    assert logits(model, noise(64, 64)).shape == (1, 5, 16, 16)
    assert logits(model, noise(61, 63)).shape == (1, 5, 16, 16)
    with pytest.raises(ValueError, match=r"takes images of 64x64 alone .* got 75x131\. Set data.crop_size"):
        logits(model, noise(75, 131))


@pytest.mark.parametrize("family", ["dinov2", "swin"])
def test_two_resolutions(family):
    model = build(ANY_SIZE[family], multi_resolution=True, detail_crop_size=(64, 64))
    assert logits(model, noise(100, 140)).shape == (1, 5, 25, 35)
    with torch.no_grad():
        output = model(noise(128, 128), detail_box=(8, 16, 64, 64), project=True)
    assert (output.logits.shape, output.detail_logits.shape) == ((1, 5, 32, 32), (1, 5, 16, 16))
    assert output.embeddings.shape == (1, 8, 16, 16)


def test_an_encoder_of_other_statistics_sees_images_as_it_was_trained():
    """Mean and deviation 0.5, as of BEiT: black is -1 and white is 1 for it, whatever the images came in as."""
    model = build(PLAIN["beit"], image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    seen = []
    model.backbone.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])

    logits(model, (images - mean) / std)

    torch.testing.assert_close(seen[0], images * 2 - 1, atol=1e-6, rtol=0)


# Files


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_has_its_encoder_in_its_own_files(family, tmp_path):
    model = build(FAMILIES[family], out_layers=(1, 2, 3, 4) if family in PLAIN else None)
    model.save_pretrained(tmp_path)
    loaded = T2SDAForSemanticSegmentation.from_pretrained(tmp_path).eval()

    assert torch.equal(logits(loaded, noise(64, 64)), logits(model, noise(64, 64)))
    assert loaded.config.backbone_config.out_indices == model.config.backbone_config.out_indices
    assert tuple(loaded.config.hidden_sizes) == tuple(model.config.hidden_sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_encoder_comes_from_its_checkpoint(family, tmp_path):
    """Without heads and with; also what the backbone form adds to it, and it starts as the identity."""
    folder = write_encoder(family, tmp_path / "encoder")
    fields = encoder_fields(folder)
    model = build(fields.pop("backbone_config"), seed=1, **fields)

    load_pretrained_encoder(model, folder)

    given = load_file(folder / "model.safetensors").values()  # under the names that the Hub's files have
    sums = {round(float(tensor.double().abs().sum()), 4) for tensor in given}
    for name, tensor in model.backbone.model.state_dict().items():
        if "hidden_states_norms" in name:
            assert (
                tensor - float(name.endswith("weight"))
            ).abs().max() < 0.021  # Hiera's norms begin with a bias of 0.02
        elif tensor.is_floating_point():
            assert round(float(tensor.double().abs().sum()), 4) in sums, name


@pytest.mark.parametrize("family", ["dinov2", "swinv2", "beit"])
def test_heads_of_a_checkpoint_are_left_out(family, tmp_path):
    torch.manual_seed(3)
    AutoModelForImageClassification.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    model = build(encoder_fields(tmp_path)["backbone_config"])

    load_pretrained_encoder(model, tmp_path)


def test_the_encoder_of_one_of_our_own_models(tmp_path):
    other, model = build(PLAIN["dinov2"], seed=5), build(PLAIN["dinov2"], seed=6)
    other.save_pretrained(tmp_path)
    pyramid = {name: tensor.clone() for name, tensor in model.backbone.pyramid.state_dict().items()}

    assert encoder_fields(tmp_path)["backbone_config"]["model_type"] == "dinov2"
    load_pretrained_encoder(model, tmp_path)

    for name, tensor in model.backbone.model.state_dict().items():
        assert torch.equal(tensor, other.backbone.model.state_dict()[name])
    assert all(torch.equal(tensor, pyramid[name]) for name, tensor in model.backbone.pyramid.state_dict().items())


def test_the_statistics_of_the_encoders_own_processor_are_found(tmp_path):
    folder = write_encoder("beit", tmp_path)
    assert "image_mean" not in encoder_fields(folder)
    processor = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert encoder_fields(folder)["image_mean"] == (0.5, 0.5, 0.5)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert encoder_fields(folder)["image_std"] == (1.0, 1.0, 1.0)


def edit(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if "layer.2.norm1" not in n and "layers.2.norm1" not in n}, "2 missing"),
        (lambda t: t | {"layernorm.weight": torch.ones(7)}, "1 of another shape"),
        (lambda t: t | {"layernorm.strange": torch.ones(7)}, r"1 that it has no place for \(layernorm.strange\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, message, tmp_path):
    folder = write_encoder("dinov2", tmp_path)
    edit(folder, change)
    model = build(PLAIN["dinov2"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(ValueError, match=f"does not hold the whole encoder: .*{message}"):
        load_pretrained_encoder(model, folder)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a 'dinov2' model, the encoder here is a 'convnext'"):
        load_pretrained_encoder(build(HIERARCHICAL["convnext"]), write_encoder("dinov2", tmp_path))
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'bert' model, which gives no feature maps"):
        encoder_fields(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint at .*accept the licence"):
        encoder_fields(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "backbone"}, "needs a backbone_config"),
        ({"backbone_config": {"model_type": "bert"}}, "a backbone that transformers has itself; got 'bert'"),
        ({"backbone_config": {"model_type": "timm_backbone"}}, "has itself; got 'timm_backbone'"),
        ({"backbone_config": PLAIN["dinov2"], "head": "deeplabv2"}, "take daformer, all_mlp or linear"),
        ({"backbone_config": PLAIN["dinov2"], "out_layers": (2, 1, 3, 4)}, "one or four layers in ascending order"),
        ({"backbone_config": PLAIN["dinov2"], "image_std": (0.0, 1.0, 1.0)}, "3 numbers"),
    ],
)
def test_a_config_of_no_backbone_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        T2SDAConfig(**fields)


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (BertConfig(), None, "gives no feature maps"),
        (PLAIN["dinov2"], (1, 2, 3, 9), "four layers from 1 to 4"),
        (HIERARCHICAL["swin"], (1, 2, 3, 4), "out_layers are for encoders whose maps have one size"),
        (Dinov2Config(hidden_act="no such"), None, "cannot build a 'dinov2' backbone"),
        (Dinov2Config(hidden_size=18, num_attention_heads=2), None, "channels must be divisible by 4; 'dinov2' has 18"),
        (
            type(HIERARCHICAL["swin"])(embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=4),
            None,
            r"strides \(4, 8, 16, 32\), and a 'swin' backbone has maps of strides \[4, 8, 16\]",
        ),
    ],
)
def test_an_encoder_without_the_levels_is_refused(config, layers, message):
    with pytest.raises(ValueError, match=message):
        measure_levels(config, layers)
