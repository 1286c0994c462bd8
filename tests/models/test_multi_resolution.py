"""HRDA in the model: boxes, fusion and crops by hand, the forward against the slow twin (method 1.5; oracle 7)."""

from collections import Counter
from typing import Any

import pytest
import reference.hrda as slow
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from transformers import AutoModelForSemanticSegmentation

from t2sda_hf.evaluation.inference import load_model
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation
from t2sda_hf.models.multi_resolution import (
    context_images,
    cut,
    draw_detail_box,
    fuse,
    mean_of_crops,
    pad_to_grid,
    slide_boxes,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def build(tiny, randomize):
    """A small network of two resolutions in float64; every tensor has values of its own."""

    def make(**fields: Any) -> T2SDAForSemanticSegmentation:
        torch.manual_seed(0)
        own = {"multi_resolution": True, "detail_crop_size": (64, 64), "projector_dim": 8, "projector_hidden": 8}
        return randomize(T2SDAForSemanticSegmentation(T2SDAConfig(**(tiny | own | fields)))).double().eval()

    return make


RESNET = {"encoder": "resnet", "head": "deeplabv2", "hidden_sizes": (16, 16, 24, 32), "projector_in_index": (3,)}


def maps_of(model: T2SDAForSemanticSegmentation, images: Tensor) -> Tensor:
    return model.encoder(images, output_hidden_states=True).hidden_states


# ------------------------------------------------------------------------------------------------------------ boxes


def test_offsets_in_1024_pixels_are_the_64_multiples_of_8_up_to_504():
    generator = Generator().manual_seed(0)
    boxes = [draw_detail_box((1024, 1024), (512, 512), 8, generator) for _ in range(2000)]
    for axis in (0, 1):
        times = Counter(box[axis] for box in boxes)
        assert sorted(times) == list(range(0, 505, 8))
        assert max(times.values()) < 2000 / 64 * 2  # uniform: 31 each, deviation 5.6
    assert {box[2:] for box in boxes} == {(512, 512)}
    assert len({box[:2] for box in boxes}) > 1000  # the two offsets are drawn apart


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ((512, 512), (512, 512), {(0, 0, 512, 512)}),  # the crop is the image
        ((518, 512), (512, 512), {(0, 0, 512, 512)}),  # a margin of 6 has room for no step of 8
        ((519, 512), (512, 512), {(0, 0, 512, 512)}),  # 8 places, offsets 0 to 7, of which 0 counts
        ((527, 512), (512, 512), {(0, 0, 512, 512), (8, 0, 512, 512)}),
        ((256, 640), (512, 512), {(0, left, 256, 512) for left in range(0, 128, 8)}),  # lower than the crop
    ],
)
def test_offsets_where_there_is_little_room(size, crop, expected):
    generator = Generator().manual_seed(0)
    assert {draw_detail_box(size, crop, 8, generator) for _ in range(300)} == expected


def test_a_box_is_a_function_of_the_generator():
    one, other = Generator().manual_seed(3), Generator().manual_seed(3)
    torch.manual_seed(0)
    first = [draw_detail_box((1024, 1024), (512, 512), 8, one) for _ in range(5)]
    torch.manual_seed(1)
    assert first == [draw_detail_box((1024, 1024), (512, 512), 8, other) for _ in range(5)]


def test_the_slide_over_1024_pixels_has_nine_crops():
    boxes = slide_boxes((1024, 1024), (512, 512))
    assert boxes == [(top, left, 512, 512) for top in (0, 256, 512) for left in (0, 256, 512)]


@pytest.mark.parametrize(
    "size", [(1024, 1024), (512, 512), (512, 1024), (768, 520), (264, 1000), (64, 64), (1032, 776)]
)
def test_slides_are_those_of_the_public_code_and_cover_everything(size):
    boxes = slide_boxes(size, (512, 512))
    assert boxes == slow.boxes_of_the_slide(*size, 512)
    seen = torch.zeros(size)
    for box in boxes:
        assert cut(seen, box).shape == box[2:]
        cut(seen, box).add_(1)
    assert seen.min() >= 1


# ------------------------------------------------------------------------------------------- images, crops and fusion


def test_the_context_is_the_mean_of_two_by_two_pixels():
    images = randn(2, 3, 6, 10)
    torch.testing.assert_close(context_images(images), slow.halved(images))


def test_padding_reaches_the_grid_and_is_zero():
    images = torch.ones(1, 3, 65, 72)
    padded = pad_to_grid(images, 8, 64)
    assert padded.shape == (1, 3, 72, 72)
    assert padded.sum() == images.sum()
    assert torch.equal(padded[..., :65, :72], images)
    assert pad_to_grid(images, 1, 64) is images
    assert pad_to_grid(torch.ones(1, 3, 8, 80), 8, 64).shape == (1, 3, 64, 80)


def test_overlapping_crops_are_averaged_by_hand():
    crops = [torch.full((1, 1, 2, 2), value) for value in (1.0, 3.0)]
    merged = mean_of_crops(crops, [(0, 0, 2, 2), (0, 1, 2, 2)], (2, 3))
    assert merged[0, 0].tolist() == [[1, 2, 3], [1, 2, 3]]


def test_without_attention_the_context_is_the_result():
    context = randn(2, 3, 4, 5)
    for box in (None, (2, 4, 4, 6)):
        detail = randn(2, 3, *((8, 10) if box is None else box[2:]), seed=1)
        result = fuse(context, detail, torch.zeros_like(context), box)
        torch.testing.assert_close(result, slow.doubled(context))


def test_with_full_attention_and_a_crop_of_the_whole_the_detail_is_the_result():
    context, detail = randn(2, 3, 4, 5), randn(2, 3, 8, 10, seed=1)
    for box in (None, (0, 0, 8, 10)):
        assert torch.equal(fuse(context, detail, torch.ones_like(context), box), detail)


def test_outside_of_the_box_the_context_is_left_alone():
    """Only at the box's edge ζ mixes the two: beyond the row next to it nothing of the detail is left."""
    context, detail = randn(1, 2, 8, 8), randn(1, 2, 8, 8, seed=1)
    result = fuse(context, detail, torch.ones_like(context), (4, 4, 8, 8))
    expected = slow.doubled(context)
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[3:13, 3:13] = False
    torch.testing.assert_close(result[..., outside], expected[..., outside])
    assert torch.equal(result[..., 5:11, 5:11], detail[..., 1:7, 1:7])


@pytest.mark.parametrize("box", [None, (2, 4, 4, 6), (0, 0, 8, 10), (4, 0, 4, 2)])
def test_fusion_is_that_of_the_paper(box):
    context, attention = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=2).sigmoid()
    detail = randn(2, 3, *((8, 10) if box is None else box[2:]), seed=1)
    given = [tensor.clone() for tensor in (context, detail, attention)]
    torch.testing.assert_close(fuse(context, detail, attention, box), slow.fused(context, detail, attention, box))
    assert all(torch.equal(one, other) for one, other in zip(given, (context, detail, attention), strict=True))


# ---------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("fields", "stride", "box"),
    [
        ({}, 4, (8, 40, 64, 64)),
        ({"head": "all_mlp"}, 4, (0, 0, 64, 64)),
        (RESNET, 8, (16, 48, 64, 64)),
    ],
)
def test_training_and_sliding_forward_are_those_of_the_paper(build, fields, stride, box):
    model = build(**fields)
    images = randn(2, 3, 96, 128)

    def segment(pixels: Tensor) -> Tensor:
        return model.decode_head(maps_of(model, pixels))

    context = maps_of(model, slow.halved(images))
    context_logits, attention = model.decode_head(context), model.scale_attention(context).sigmoid()
    top, left, height, width = box
    detail = segment(images[..., top : top + height, left : left + width])
    cells = (top // stride, left // stride, height // stride, width // stride)

    trained = model(images, detail_box=box)
    torch.testing.assert_close(trained.logits, slow.fused(context_logits, detail, attention, cells))
    torch.testing.assert_close(trained.detail_logits, detail)
    assert trained.detail_box == box
    assert trained.logits.shape == (2, 5, 96 // stride, 128 // stride)

    seen = model(images)
    covered = slow.slid(segment, images, 64, stride, 5)
    torch.testing.assert_close(seen.logits, slow.fused(context_logits, covered, attention, None))
    assert seen.detail_logits is None
    assert seen.detail_box is None


def test_embeddings_and_hidden_states_are_those_of_the_context(build):
    model, images = build(), randn(2, 3, 96, 128)
    maps = maps_of(model, slow.halved(images))
    expected = model.projector(maps)
    for arguments in ({}, {"detail_box": (8, 8, 64, 64)}, {"segment": False}):
        output = model(images, project=True, output_hidden_states=True, **arguments)
        torch.testing.assert_close(output.embeddings, expected)
        assert all(torch.allclose(one, other) for one, other in zip(output.hidden_states, maps, strict=True))
    small = model(context_images(images), project=True, segment=False, at_context_scale=True)
    torch.testing.assert_close(small.embeddings, expected)


def count_images(model: T2SDAForSemanticSegmentation) -> list[tuple[int, ...]]:
    """A list that fills with (images, height, width) of everything the encoder sees."""
    seen: list[tuple[int, ...]] = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), *args[0].shape[-2:])))
    return seen


@pytest.mark.parametrize(("limit", "batches"), [(None, [18]), (18, [18]), (8, [8, 8, 2]), (1, [1] * 18)])
def test_crops_run_together_up_to_the_limit_and_give_the_same(build, limit, batches):
    images = randn(2, 3, 128, 128)
    model = build(detail_crops_at_once=limit)
    seen = count_images(model)
    logits = model(images).logits
    assert seen == [(2, 64, 64)] + [(num, 64, 64) for num in batches]
    torch.testing.assert_close(logits, build()(images).logits)


def test_a_training_forward_sees_two_scales_and_a_projection_one(build):
    model, images = build(), randn(2, 3, 128, 192)
    seen = count_images(model)
    model(images, detail_box=(64, 0, 64, 64))
    model(images, project=True, segment=False)
    assert seen == [(2, 64, 96), (2, 64, 64), (2, 64, 96)]


def test_no_box_is_kept(build):
    """The public code keeps it in the module; a forward without one then reads the last."""
    model, images = build(), randn(1, 3, 96, 128)
    sliding = model(images).logits
    state = {name: set(vars(part)) for name, part in model.named_modules()}
    first = model(images, detail_box=(0, 0, 64, 64)).logits
    model(images, detail_box=(24, 64, 64, 64))
    assert torch.equal(model(images).logits, sliding)
    assert torch.equal(model(images, detail_box=(0, 0, 64, 64)).logits, first)
    assert not torch.equal(first, sliding)
    assert {name: set(vars(part)) for name, part in model.named_modules()} == state


@pytest.mark.parametrize("size", [(70, 91), (32, 40), (97, 128), (64, 64)])
def test_any_size_has_logits_of_its_own_size(build, size):
    model, images = build(), randn(1, 3, *size)
    logits = model(images).logits
    height, width = (max(-side % 8 + side, 64) for side in size)
    padded = torch.zeros(1, 3, height, width, dtype=torch.float64)
    padded[..., : size[0], : size[1]] = images
    rows, columns = (-(-side // 4) for side in size)
    assert logits.shape == (1, 5, rows, columns)
    assert torch.equal(logits, model(padded).logits[..., :rows, :columns])


def test_gradients_reach_encoder_head_and_attention_by_both_scales(build):
    model = build(drop_path_rate=0.0).train()
    output = model(randn(2, 3, 128, 128), detail_box=(0, 8, 64, 64))
    output.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("projector."):
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name


def test_the_attention_is_not_detached_from_the_context(build):
    """Only the attention sees the encoder here: the heads' logits are constants."""
    model = build(drop_path_rate=0.0)
    nn.init.zeros_(model.decode_head.classifier.weight)
    model.decode_head.classifier.bias.data = torch.arange(5.0, dtype=torch.float64)
    images = randn(1, 3, 128, 128)
    logits = model(images).logits
    torch.testing.assert_close(logits, torch.arange(5.0, dtype=torch.float64).view(1, 5, 1, 1).expand_as(logits))
    # a·z + (1-a)·z is z whatever a is, so a box is needed for the attention to matter: there the edge shows it.
    model(images, detail_box=(32, 32, 64, 64)).logits.sum().backward()
    assert model.segformer.stages[0].patch_embeddings.proj.weight.grad.abs().max() > 0


def test_batch_norm_sees_context_and_detail_apart(build):
    model = build().train()
    norm = model.decode_head.bottleneck[1]
    before = int(norm.num_batches_tracked)
    model(randn(2, 3, 128, 128), detail_box=(0, 0, 64, 64))
    assert int(norm.num_batches_tracked) == before + 2


def test_number_of_parameters_with_b5():
    """Attention: linear layers 263,168, fusion 262,144 and 512, classifier 4,883."""
    with torch.device("meta"):
        model = T2SDAForSemanticSegmentation(T2SDAConfig.from_size("mit_b5", num_labels=19, multi_resolution=True))
    attention = sum(parameter.numel() for parameter in model.scale_attention.parameters())
    assert attention == 263_168 + 262_144 + 512 + 4_883
    assert sum(parameter.numel() for parameter in model.decode_head.parameters()) == 3_712_275
    output = model(torch.empty(2, 3, 1024, 1024, device="meta"), detail_box=(504, 0, 512, 512), project=True)
    assert output.logits.shape == (2, 19, 256, 256)
    assert output.detail_logits.shape == (2, 19, 128, 128)
    assert output.embeddings.shape == (2, 256, 128, 128)


# ------------------------------------------------------------------------------------------------- saving, refusing


def test_a_saved_model_comes_back(build, tmp_path):
    model, images = build(detail_crops_at_once=4), randn(1, 3, 96, 128)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.detail_crop_size == (64, 64)
    assert (loaded.config.multi_resolution, loaded.config.detail_crops_at_once) == (True, 4)
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_a_network_without_its_attention_is_refused(build, tmp_path):
    build().float().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("scale_attention.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"of the daformer head, without scale_attention\."):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detail_box": (4, 0, 64, 64)}, r"multiples of 8; got \(4, 0, 64, 64\)"),
        ({"detail_box": (0, 0, 64, 60)}, "multiples of 8"),
        ({"detail_box": (40, 0, 64, 64)}, "must lie in the 96x128 image"),
        ({"detail_box": (0, -8, 64, 64)}, "must lie in the 96x128 image"),
        ({"detail_box": (0, 0, 64, 0)}, "must lie in the 96x128 image"),
        ({"detail_box": (0, 0, 64, 64), "segment": False, "project": True}, "and segment"),
        ({"at_context_scale": True}, "segment=False"),
    ],
)
def test_a_box_off_the_grid_is_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(randn(1, 3, 96, 128), **arguments)


def test_a_network_of_one_resolution_takes_no_box(build):
    model = build(multi_resolution=False)
    assert not hasattr(model, "scale_attention")
    for arguments in ({"detail_box": (0, 0, 64, 64)}, {"at_context_scale": True, "segment": False}):
        with pytest.raises(ValueError, match="multi_resolution=True in the config"):
            model(randn(1, 3, 96, 128), **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"detail_crop_size": (500, 512)}, r"two multiples of 8 .*got \(500, 512\)"),
        ({"detail_crop_size": (16, 64)}, "at least 32"),
        ({"detail_crop_size": (64,)}, "two multiples"),
        (RESNET | {"detail_crop_size": (72, 64)}, "two multiples of 16"),
        ({"head": "deeplabv2", "detail_crop_size": (96, 96)}, "two multiples of 64"),
        ({"detail_crops_at_once": 0}, "detail_crops_at_once must be at least 1, or None; got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        T2SDAConfig(multi_resolution=True, **fields)
