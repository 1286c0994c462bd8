import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import FAMILIES
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
    pipeline,
)

from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor, T2SDAOutput

HEADS = ("daformer", "all_mlp")
LEVEL_SIZES = ((18, 23), (9, 12), (5, 6), (3, 3))  # of 70 x 91 pixels: strides 4, 8, 16, 32, rounded up


@pytest.fixture
def small(tiny):
    """The tiny config with a small projector too."""
    return tiny | {"projector_dim": 12, "projector_hidden": 8}


def build(seed: int = 0, **fields) -> T2SDAForSemanticSegmentation:
    torch.manual_seed(seed)
    return T2SDAForSemanticSegmentation(T2SDAConfig(**fields))


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def drop_tensors(folder: Path, *parts: str) -> None:
    """Remove from a checkpoint every tensor whose name contains one of `parts`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, path, metadata={"format": "pt"})


# What comes out


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((70, 91), LEVEL_SIZES),
        ((32, 32), ((8, 8), (4, 4), (2, 2), (1, 1))),
        ((33, 64), ((9, 16), (5, 8), (3, 4), (2, 2))),
    ],
)
def test_shapes_of_all_outputs(small, head, size, levels):
    model = build(**small, head=head).eval()

    output = model(torch.randn(2, 3, *size), project=True, output_hidden_states=True)

    assert output.loss is None
    assert output.logits.shape == (2, 5, *levels[0])
    assert output.embeddings.shape == (2, 12, *levels[0])
    assert output.embeddings.is_contiguous(memory_format=torch.channels_last)
    assert [tuple(one.shape) for one in output.hidden_states] == [
        (2, channels, *level) for channels, level in zip((8, 16, 24, 32), levels, strict=True)
    ]


def test_only_what_is_asked_for_is_returned(small, images):
    model = build(**small).eval()
    labels = torch.zeros(2, 70, 91, dtype=torch.long)

    assert list(model(images)) == ["logits"]
    assert list(model(images, project=True)) == ["logits", "embeddings"]
    assert list(model(images, project=True, segment=False)) == ["embeddings"]
    assert list(model(images, segment=False, output_hidden_states=True)) == ["hidden_states"]
    everything = model(images, labels, project=True, output_hidden_states=True)
    assert isinstance(everything, T2SDAOutput)
    assert list(everything) == ["loss", "logits", "embeddings", "hidden_states"]


def test_parts_that_are_not_asked_for_do_not_run(small, images):
    """In training a forward moves a batch norm's statistics, which tells who ran."""
    model = build(**small).train()

    def runs() -> tuple[int, int]:
        return int(model.decode_head.bottleneck[1].num_batches_tracked), int(
            model.projector.block1[1].num_batches_tracked
        )

    model(images)
    assert runs() == (1, 0)
    model(images, project=True, segment=False)
    assert runs() == (1, 1)
    model(images, segment=False, output_hidden_states=True)
    assert runs() == (1, 1)


def test_return_dict_and_hidden_states_follow_the_config_unless_given(small, images):
    model = build(**small).eval()
    logits = model(images).logits
    plain = build(**small, return_dict=False, output_hidden_states=True).eval()

    pair = plain(images)

    assert type(pair) is tuple
    assert len(pair) == 2
    assert torch.equal(pair[0], logits)
    assert len(pair[1]) == 4
    assert torch.equal(plain(images, return_dict=True, output_hidden_states=False)[0], logits)
    assert list(plain(images, return_dict=True, output_hidden_states=False)) == ["logits"]
    assert torch.equal(model(images, return_dict=False)[0], logits)


def test_the_loss_is_the_first_of_the_outputs(small, images):
    """As in every model of transformers; `Trainer` reads it there."""
    model = build(**small).eval()
    labels = torch.zeros(2, 70, 91, dtype=torch.long)

    output = model(images, labels, project=True)
    loss, logits, embeddings = model(images, labels, project=True, return_dict=False)

    assert torch.equal(output[0], output.loss)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(embeddings, output.embeddings)


def test_hidden_states_are_the_encoders_and_feed_head_and_projector(small, images):
    model = build(**small).eval()
    expected = model.segformer(images, output_hidden_states=True).hidden_states

    output = model(images, project=True, output_hidden_states=True)

    assert all(torch.equal(one, other) for one, other in zip(output.hidden_states, expected, strict=True))
    assert torch.equal(output.logits, model.decode_head(expected))
    assert torch.equal(output.embeddings, model.projector(expected))


@pytest.mark.parametrize("head", HEADS)
def test_images_of_a_batch_do_not_see_each_other(small, images, head):
    model = build(**small, head=head).eval()

    together = model(images, project=True)
    alone = [model(image[None], project=True) for image in images]

    for name in ("logits", "embeddings"):
        torch.testing.assert_close(together[name], torch.cat([one[name] for one in alone]), rtol=1e-5, atol=2e-5)


def test_embeddings_send_gradients_to_encoder_and_projector_only(small, images):
    """Method 10, oracle 9."""
    model = build(**small, drop_path_rate=0.0).train()

    model(images, project=True).embeddings.square().sum().backward()

    assert all(parameter.grad is None for parameter in model.decode_head.parameters())
    trained = [*model.segformer.named_parameters(), *model.projector.named_parameters()]
    assert all(parameter.grad.isfinite().all() for _, parameter in trained)
    # A shift of all keys leaves softmax as it is, so their bias never has a gradient beyond rounding.
    assert all(parameter.grad.abs().max() > 0 for name, parameter in trained if "k_proj.bias" not in name)


def test_segmentation_sends_no_gradient_to_the_projector(small, images):
    model = build(**small).train()

    model(images, torch.zeros(2, 70, 91, dtype=torch.long), project=True).loss.backward()

    assert all(parameter.grad is None for parameter in model.projector.parameters())


# Loss


def slow_loss(logits: Tensor, labels: Tensor, ignore: int) -> tuple[float, int]:
    """Mean of -log softmax over the pixels that count, one at a time, after bilinear upsampling by its definition."""
    values = logits.double().numpy()
    height, width = labels.shape[-2:]

    def neighbours(index: int, old: int, new: int) -> tuple[int, int, float]:
        position = max((index + 0.5) * old / new - 0.5, 0.0)
        low = min(int(position), old - 1)
        return low, min(low + 1, old - 1), position - low

    total, count = 0.0, 0
    for image, row, column in np.ndindex(*labels.shape):
        label = int(labels[image, row, column])
        if label == ignore:
            continue
        top, bottom, down = neighbours(row, values.shape[2], height)
        left, right, across = neighbours(column, values.shape[3], width)
        scores = (1 - down) * ((1 - across) * values[image, :, top, left] + across * values[image, :, top, right])
        scores += down * ((1 - across) * values[image, :, bottom, left] + across * values[image, :, bottom, right])
        total += math.log(np.exp(scores).sum()) - scores[label]
        count += 1
    return total / count, count


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("size", [(70, 91), (18, 23), (7, 40)])
def test_loss_is_the_mean_cross_entropy_of_the_valid_pixels(small, images, randomize, size, dtype):
    model = randomize(build(**small)).eval()
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (2, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    labels[1, : size[0] // 2] = 255

    output = model(images, labels.to(dtype))

    with torch.no_grad():
        expected, count = slow_loss(model(images).logits, labels, ignore=255)
    assert 0 < count < 0.6 * labels.numel()
    assert output.loss.ndim == 0
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_another_ignore_index_is_taken_from_the_config(small, images):
    model = build(**small, semantic_loss_ignore_index=2).eval()
    labels = torch.randint(0, 5, (2, 18, 23), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        output = model(images, labels)

    assert output.loss.item() == pytest.approx(slow_loss(output.logits, labels, ignore=2)[0], rel=1e-5)


def test_loss_without_any_valid_pixel_is_zero_with_zero_gradients(small, images):
    model = build(**small).train()

    loss = model(images, torch.full((2, 70, 91), 255)).loss
    loss.backward()

    assert loss.item() == 0
    gradients = [parameter.grad for parameter in model.decode_head.parameters()]
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"segment": False}, (2, 70, 91), "leave out segment=False, or the labels"),
        ({}, (2, 1, 70, 91), r"got \(2, 1, 70, 91\) for 2 images"),
        ({}, (70, 91), r"got \(70, 91\) for 2 images"),
        ({}, (3, 70, 91), r"one map per image; got \(3, 70, 91\) for 2 images"),
    ],
)
def test_labels_that_do_not_fit_are_refused(small, images, settings, shape, message):
    with pytest.raises(ValueError, match=message):
        build(**small)(images, torch.zeros(shape, dtype=torch.long), **settings)


# The encoder


def norm_eps(encoder: SegformerModel) -> dict[str, set[float]]:
    """eps by kind of norm, told apart by the names that transformers 5 gives them."""
    kinds = {
        "patch": "patch_embeddings.layer_norm",
        "reduction": "sequence_reduction.layer_norm",
        "block before": "layernorm_before",
        "block after": "layernorm_after",
    }
    found: dict[str, set[float]] = {}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.LayerNorm):
            kind = next((kind for kind, end in kinds.items() if name.endswith(end)), "stage")
            found.setdefault(kind, set()).add(module.eps)
    return found


FIXED = {"patch": {1e-5}, "reduction": {1e-5}, "block before": {1e-6}, "block after": {1e-6}, "stage": {1e-6}}
UNFIXED = {kind: {1e-5} for kind in FIXED}


def test_eps_of_block_and_stage_norms_is_1e_6_and_of_others_1e_5(small, tmp_path, images):
    """Method 1.1, also where blocks are many, and after a round trip, since files hold no eps."""
    model = build(**(small | {"depths": (2, 1, 3, 1)}))
    model.save_pretrained(tmp_path)
    loaded = T2SDAForSemanticSegmentation.from_pretrained(tmp_path)

    assert norm_eps(model.segformer) == norm_eps(loaded.segformer) == FIXED
    assert norm_eps(AutoModelForSemanticSegmentation.from_pretrained(tmp_path).segformer) == FIXED


def test_eps_can_be_left_as_transformers_has_it(small, tmp_path):
    model = build(**small, encoder_ln_eps_fix=False)
    model.save_pretrained(tmp_path)

    assert norm_eps(model.segformer) == UNFIXED
    assert norm_eps(T2SDAForSemanticSegmentation.from_pretrained(tmp_path).segformer) == UNFIXED
    switched = T2SDAForSemanticSegmentation.from_pretrained(tmp_path, encoder_ln_eps_fix=True)
    assert norm_eps(switched.segformer) == FIXED


def test_eps_is_the_configs(small):
    eps = norm_eps(build(**small, layer_norm_eps=1e-3).segformer)

    assert eps == FIXED | {kind: {1e-3} for kind in ("block before", "block after", "stage")}


def test_eps_reaches_the_output(small):
    """A stage's norm of a map with variance v divides by sqrt(v + eps): at v = 1e-6 that is plain to see."""
    norm = build(**small).segformer.stages[0].layer_norm
    tokens = torch.tensor([1e-3, -1e-3] * 4)

    torch.testing.assert_close(norm(tokens), tokens / math.sqrt(1e-6 + 1e-6))


def test_stochastic_depth_rises_over_the_whole_encoder_to_the_last_block(small):
    """Method 1.1: 0.1 * k / (blocks - 1)."""
    model = build(**(small | {"depths": (1, 2, 1, 1)}))

    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.segformer.stages for block in stage.blocks]

    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])


def test_eager_attention_gives_the_same_outputs(small, images):
    model = build(**small).eval()
    expected = model(images, project=True)
    model.set_attn_implementation("eager")

    output = model(images, project=True)

    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.embeddings, expected.embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_checkpointed_activations_give_the_same_gradients(small, images, head):
    """With drop path and dropout on: what is computed twice must draw the same numbers twice."""
    labels = torch.randint(0, 5, (2, 70, 91), generator=torch.Generator().manual_seed(0))
    results = []
    for checkpointing in (False, True):
        model = build(**small, head=head, drop_path_rate=0.5).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        torch.manual_seed(1)
        output = model(images, labels, project=True)
        (output.loss + output.embeddings.mean()).backward()
        results.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain, gradients), (checkpointed, again) = results
    assert torch.equal(plain.loss, checkpointed.loss)
    assert torch.equal(plain.embeddings, checkpointed.embeddings)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


# New weights


@pytest.mark.parametrize("head", HEADS)
def test_new_weights_of_head_and_projector(tiny, head):
    """Method 1.3: Kaiming-normal (fan out, ReLU) before a norm, N(0, 0.01^2) and 0 in the classifier, linear layers
    uniform within 1 / sqrt(inputs)."""
    model = build(**(tiny | {"decoder_hidden_size": 64, "num_labels": 100}), head=head)
    kinds = set()
    for part in (model.decode_head, model.projector):
        for name, module in part.named_modules():
            if name == "classifier":
                assert module.weight.std().item() == pytest.approx(0.01, rel=0.05)
                assert torch.equal(module.bias, torch.zeros(100))
                kinds.add("classifier")
            elif isinstance(module, nn.Conv2d):
                assert module.bias is None
                outputs, _, height, width = module.weight.shape
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (outputs * height * width)), rel=0.1)
                assert abs(module.weight.mean()) < 0.1 * module.weight.std()
                assert module.weight.abs().max() > 2.5 * module.weight.std()  # which a uniform draw never reaches
                kinds.add("convolution")
            elif isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for tensor in (module.weight, module.bias):
                    assert tensor.abs().max() <= bound
                    assert tensor.abs().max() > 0.9 * bound
                kinds.add("linear")
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.eps, module.momentum) == (1e-5, 0.1)
                assert module.weight.unique().tolist() == module.running_var.unique().tolist() == [1]
                assert module.bias.unique().tolist() == module.running_mean.unique().tolist() == [0]
                kinds.add("norm")
    assert kinds == {"classifier", "convolution", "linear", "norm"}


def test_new_weights_of_the_encoder_are_those_of_transformers(tiny):
    """Drawn by `SegformerModel` itself, before anything of ours: the same seed gives the same encoder."""
    model = build(**tiny, seed=5)
    torch.manual_seed(5)

    assert_same_tensors(model.segformer, SegformerModel(SegformerConfig(**tiny)))


def test_a_new_model_is_a_function_of_the_seed(small):
    assert_same_tensors(build(**small, seed=1), build(**small, seed=1))
    ours, theirs = build(**small, seed=1).state_dict(), build(**small, seed=2).state_dict()
    drawn = [name for name, tensor in ours.items() if tensor.ndim > 1]
    assert len(drawn) > 40
    assert not any(torch.equal(ours[name], theirs[name]) for name in drawn)


def test_every_buffer_is_saved(small):
    """transformers fills buffers that are not in the files with whatever was in memory."""
    model = build(**small)

    assert dict(model.named_buffers()).keys() <= model.state_dict().keys()


# Files


@pytest.mark.parametrize("save_original_format", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"head": "daformer", "head_dilations": (1, 3)},
        {"head": "all_mlp", "projector_kernel": 3, "projector_in_index": (1, 2)},
        {"head": "all_mlp", "projector_final_relu": False, "encoder_ln_eps_fix": False},
    ],
)
def test_a_saved_model_comes_back_bit_equal(small, images, tmp_path, randomize, fields, save_original_format):
    model = randomize(build(**small, **fields)).eval()
    model.save_pretrained(tmp_path, save_original_format=save_original_format)

    loaded, info = T2SDAForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not loaded.training
    assert_same_tensors(loaded, model)
    with torch.no_grad():
        ours, theirs = model(images, project=True), loaded(images, project=True)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.embeddings, theirs.embeddings)
    assert {name: getattr(loaded.config, name) for name in fields} == fields


def test_saving_again_writes_the_same_files(small, tmp_path, randomize):
    randomize(build(**small)).save_pretrained(tmp_path / "first")
    T2SDAForSemanticSegmentation.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")

    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_loaded_weights_own_aligned_memory(small, tmp_path):
    """Where a product rounds by the address of its operand, tensors in a mapped file would give other outputs."""
    build(**small).save_pretrained(tmp_path)
    loaded = T2SDAForSemanticSegmentation.from_pretrained(tmp_path)
    assert {tensor.data_ptr() % 64 for tensor in loaded.parameters()} == {0}


def test_weights_are_saved_as_safetensors_only(small, tmp_path):
    """No pickle: besides the code, which a checkpoint needs elsewhere, there is one file of weights and the config."""
    build(**small).save_pretrained(tmp_path)

    names = {path.name for path in tmp_path.iterdir()}

    assert {"modeling_t2sda.py", "configuration_t2sda.py"} < names
    assert {name for name in names if not name.endswith(".py")} == {"config.json", "model.safetensors"}


def test_auto_classes_find_model_config_and_image_processor(small, tmp_path):
    model = build(**small)
    model.save_pretrained(tmp_path)
    T2SDAImageProcessor(size=(32, 48)).save_pretrained(tmp_path)

    assert type(AutoConfig.from_pretrained(tmp_path)) is T2SDAConfig
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(loaded) is T2SDAForSemanticSegmentation
    assert_same_tensors(loaded, model)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is T2SDAImageProcessor
    assert processor.size == {"height": 32, "width": 48}


def test_a_checkpoint_loads_where_this_package_is_not_installed(small, images, tmp_path, randomize):
    """With the code that lies beside the weights, and transformers' permission to run it: a MiT, and any backbone."""
    sizes = {"decoder_hidden_size": 8, "projector_dim": 8, "projector_hidden": 8, "num_labels": 5}
    backbones = {name: {"backbone_config": FAMILIES[name]} | sizes for name in ("dinov2", "swin")}
    for name, fields in ({"mit": small} | backbones).items():
        model = randomize(build(**fields)).eval()
        model.save_pretrained(tmp_path / name)
        T2SDAImageProcessor(size=(70, 91)).save_pretrained(tmp_path / name)
        with torch.no_grad():
            output = model(images, project=True)
        tensors = {"images": images, "logits": output.logits, "embeddings": output.embeddings}
        save_file({key: one.contiguous() for key, one in tensors.items()}, tmp_path / f"{name}.safetensors")
    program = """
import sys
sys.modules["t2sda_hf"] = None  # importing it fails from here on
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

for name in ("mit", "dinov2", "swin"):
    expected = load_file(f"{name}.safetensors")
    model = AutoModelForSemanticSegmentation.from_pretrained(name, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    with torch.no_grad():
        output = model(expected["images"], project=True)
    torch.testing.assert_close(output.logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.embeddings, expected["embeddings"], rtol=1e-5, atol=1e-5)
    assert processor(torch.zeros(3, 7, 9), return_tensors="pt")["pixel_values"].shape == (1, 3, 70, 91)
print("all is well")
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert result.stdout.endswith("all is well\n"), result.stderr


@pytest.mark.parametrize(
    ("encoder", "from_folder"), [("mit", False), ("mit", True), ("dinov2", True), ("convnext", True)]
)
def test_the_segmentation_pipeline_masks_what_the_model_says(small, tmp_path, randomize, caplog, encoder, from_folder):
    """The masks of all classes are the label map, at the size of the image."""
    names = {0: "road", 1: "car", 2: "sky", 3: "tree", 4: "bus"}
    fields = small if encoder == "mit" else {"backbone_config": FAMILIES[encoder], "decoder_hidden_size": 8}
    model = randomize(build(**fields, id2label=names)).eval()
    processor = T2SDAImageProcessor(size=(64, 96))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 81, 3), dtype=np.uint8))
    if from_folder:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        segment = pipeline("image-segmentation", model=str(tmp_path), trust_remote_code=False, device="cpu")
        assert type(segment.model) is T2SDAForSemanticSegmentation
        assert type(segment.image_processor) is T2SDAImageProcessor
    else:
        segment = pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")

    masks = segment(image)

    with torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits
    for size in ((64, 96), (50, 81)):  # the network's input, then the image: the order of the published numbers
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    labels = logits[0].argmax(0).numpy()
    assert "is not supported" not in caplog.text
    assert len(masks) >= 2
    assert [one["label"] for one in masks] == [names[index] for index in np.unique(labels)]
    for one, index in zip(masks, np.unique(labels), strict=True):
        assert np.array_equal(np.asarray(one["mask"]) == 255, labels == index)


def test_a_pipeline_says_when_a_batch_needs_one_size(small, randomize, caplog):
    images = [Image.new("RGB", (64, height)) for height in (48, 64)]
    processor, words = T2SDAImageProcessor(), "leave batch_size at 1"
    segment = pipeline("image-segmentation", model=build(**small).eval(), image_processor=processor, device="cpu")
    with caplog.at_level(logging.WARNING, logger="transformers"):
        segment(images)
        assert words not in caplog.text
        with pytest.raises(RuntimeError, match="Sizes of tensors"):
            segment(images, batch_size=2)
    assert words in caplog.text
    caplog.clear()
    processor.size = {"height": 64, "width": 64}
    assert len(segment(images, batch_size=2)) == 2
    assert words not in caplog.text


# Plain SegFormer files


@pytest.mark.parametrize("names", ["transformers", "Hub"])
def test_a_plain_segformer_gives_its_own_outputs(tiny, images, tmp_path, randomize, write_hub_files, names):
    torch.manual_seed(0)
    segformer = randomize(SegformerForSemanticSegmentation(SegformerConfig(**tiny))).eval()
    if names == "Hub":
        folder = write_hub_files(segformer)
    else:
        folder = tmp_path
        segformer.save_pretrained(folder)
    # This is what "old names" means; our own table of them must not hide a change of transformers' format.
    in_file = load_file(folder / "model.safetensors").keys()
    assert "segformer.encoder.block.0.0.attention.self.query.weight" in in_file
    assert "decode_head.linear_c.3.proj.bias" in in_file

    model, info = T2SDAForSemanticSegmentation.from_pretrained(
        folder, encoder_ln_eps_fix=False, output_loading_info=True
    )

    assert {name.split(".")[0] for name in info["missing_keys"]} == {"projector"}
    assert not info["unexpected_keys"]
    assert model.config.head == "all_mlp"
    with torch.no_grad():
        expected = segformer(images, output_hidden_states=True)
        output = model(images, output_hidden_states=True)
    assert all(torch.equal(*pair) for pair in zip(output.hidden_states, expected.hidden_states, strict=True))
    # The head computes the same function in another order (performance, section 2).
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_a_plain_segformer_gets_a_new_projector_that_is_fit_for_use(tiny, images, write_hub_files):
    folder = write_hub_files(SegformerForSemanticSegmentation(SegformerConfig(**tiny)))

    torch.manual_seed(3)
    model = T2SDAForSemanticSegmentation.from_pretrained(folder)

    for block in (model.projector.block1, model.projector.block2):
        convolution, norm, _ = block
        assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / convolution.out_channels), rel=0.05)
        assert norm.running_var.unique().tolist() == norm.weight.unique().tolist() == [1]
        assert norm.running_mean.unique().tolist() == norm.bias.unique().tolist() == [0]
        assert norm.num_batches_tracked == 0
    torch.manual_seed(3)
    assert_same_tensors(model, T2SDAForSemanticSegmentation.from_pretrained(folder))


def test_a_plain_segformer_survives_our_own_format(tiny, images, tmp_path, randomize, write_hub_files):
    """Loaded from old names, saved as a T2S-DA model, loaded again: nothing falls back to random values."""
    folder = write_hub_files(randomize(SegformerForSemanticSegmentation(SegformerConfig(**tiny))))
    model = T2SDAForSemanticSegmentation.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")

    loaded, info = T2SDAForSemanticSegmentation.from_pretrained(tmp_path / "ours", output_loading_info=True)

    assert not info["missing_keys"]
    assert loaded.config.head == "all_mlp"
    assert_same_tensors(loaded, model)


@pytest.mark.parametrize("model_class", [SegformerModel, SegformerForImageClassification])
def test_an_encoder_alone_gets_a_new_head(tiny, tmp_path, randomize, model_class):
    segformer = randomize(model_class(SegformerConfig(**tiny)))
    segformer.save_pretrained(tmp_path)

    model, info = T2SDAForSemanticSegmentation.from_pretrained(tmp_path, head="daformer", output_loading_info=True)

    assert_same_tensors(model.segformer, getattr(segformer, "segformer", segformer))
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"projector", "decode_head"}
    assert model.decode_head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert model.decode_head.classifier.bias.abs().max() == 0
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# Files that do not hold what they should


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("segformer.encoder.block.2.0.mlp.dense1.bias", r"for 1 tensors of the encoder: segformer\.stages\.2"),
        ("segformer.encoder.layer_norm.3", r"for 2 tensors of the encoder: segformer\.stages\.3\.layer_norm"),
        ("segformer.", r"for 108 tensors of the encoder: .* and 103 more\. They would stay random"),
    ],
)
def test_an_encoder_that_is_missing_in_part_is_refused(small, tmp_path, dropped, message):
    build(**small).save_pretrained(tmp_path)
    drop_tensors(tmp_path, dropped)

    with pytest.raises(ValueError, match=message):
        T2SDAForSemanticSegmentation.from_pretrained(tmp_path)


def test_a_config_with_more_blocks_than_the_files_is_refused(small, tmp_path):
    build(**small).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="for 22 tensors of the encoder"):
        T2SDAForSemanticSegmentation.from_pretrained(tmp_path, depths=(2, 1, 1, 1))


def test_an_encoder_of_another_shape_is_refused_even_if_mismatches_are_ignored(small, tmp_path):
    build(**small).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"tensors of the encoder: .*They would stay random"):
        T2SDAForSemanticSegmentation.from_pretrained(
            tmp_path, hidden_sizes=(8, 16, 24, 64), ignore_mismatched_sizes=True
        )


def test_a_classifier_for_other_classes_may_be_replaced(small, tmp_path):
    """What fine-tuning on other classes does: everything but the classifier is kept."""
    model = build(**small)
    model.save_pretrained(tmp_path)

    loaded = T2SDAForSemanticSegmentation.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)

    assert loaded.decode_head.classifier.weight.shape == (7, 16, 1, 1)
    assert_same_tensors(loaded.segformer, model.segformer)
    assert_same_tensors(loaded.projector, model.projector)
    assert_same_tensors(loaded.decode_head.bottleneck, model.decode_head.bottleneck)


@pytest.mark.parametrize(
    ("head", "dropped", "message"),
    [
        ("daformer", "decode_head.classifier", r"for 56 of the 58 tensors of the daformer head, without decode_head"),
        ("daformer", "bottleneck.1.running_var", r"for 57 of the 58 tensors .*bottleneck\.1\.running_var"),
        ("all_mlp", "linear_c.2.proj.weight", r"for 15 of the 16 tensors of the all_mlp head"),
    ],
)
def test_a_head_that_is_missing_in_part_is_refused(small, tmp_path, head, dropped, message):
    build(**small, head=head).save_pretrained(tmp_path)
    drop_tensors(tmp_path, dropped)

    with pytest.raises(ValueError, match=message):
        T2SDAForSemanticSegmentation.from_pretrained(tmp_path)


def test_the_files_of_another_head_are_refused(small, tmp_path, write_hub_files, tiny):
    """The classifiers of both heads have one name and shape, so only the rest would stay random."""
    build(**small).save_pretrained(tmp_path / "ours")
    segformer = write_hub_files(SegformerForSemanticSegmentation(SegformerConfig(**tiny)))

    with pytest.raises(ValueError, match=r"for 2 of the 16 tensors of the all_mlp head"):
        T2SDAForSemanticSegmentation.from_pretrained(tmp_path / "ours", head="all_mlp")
    with pytest.raises(ValueError, match=r"for 2 of the 58 tensors of the daformer head"):
        T2SDAForSemanticSegmentation.from_pretrained(segformer, head="daformer")


def test_a_missing_projector_is_no_error_and_a_whole_missing_head_neither(small, tmp_path):
    """Both are trained from new weights; plain SegFormers and encoders come without them."""
    model = build(**small)
    model.save_pretrained(tmp_path)
    drop_tensors(tmp_path, "projector.", "decode_head.")

    loaded = T2SDAForSemanticSegmentation.from_pretrained(tmp_path)

    assert type(loaded) is T2SDAForSemanticSegmentation
    assert_same_tensors(loaded.segformer, model.segformer)


def test_the_config_on_disk_is_readable_json_with_our_model_type(small, tmp_path):
    build(**small).save_pretrained(tmp_path)

    values = json.loads((tmp_path / "config.json").read_text())

    assert values["model_type"] == "t2sda"
    assert values["architectures"] == ["T2SDAForSemanticSegmentation"]
    assert values["auto_map"] == {
        "AutoConfig": "configuration_t2sda.T2SDAConfig",
        "AutoModelForSemanticSegmentation": "modeling_t2sda.T2SDAForSemanticSegmentation",
    }
