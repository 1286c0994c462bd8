"""The objective: which networks run, where gradients go, what is compared with what, and what is drawn."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference.mixing as slow_mixing
import reference.pull as slow
import reference.segmentation as slow_segmentation
import torch
import torch.nn.functional as F
from reference.fda import fda
from reference.samples import Listed, blocked, listed
from tiny import CLASSES, CROP, alone, tiny_batch, tiny_config, tiny_graphs, tiny_networks, tiny_step, together
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from t2sda_hf.batch import UdaBatch, normalize
from t2sda_hf.config import RunConfig
from t2sda_hf.losses.pull import PullSamples, as_pixels
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.methods import METHODS, ClassMemory, Networks, pull, t2sda_losses

K = len(CLASSES)
CALM = "--model={head_dropout: 0, drop_path_rate: 0}"  # nothing random inside the networks
PLAIN = "--augment={jitter_probability: 0, blur_probability: 0}"  # mixed images are not augmented


def all_losses(*args: Any, **kwargs: Any) -> dict[str, float]:
    return {name: value.item() for name, value in together(tiny_graphs(*args, **kwargs))[0].items()}


def inputs_of(network: nn.Module) -> list[Tensor]:
    """A list that fills with the images that the network is given."""
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


def embeddings_of(network: nn.Module) -> list[Tensor]:
    """A list that fills with what the network's projector returns."""
    made: list[Tensor] = []
    network.projector.register_forward_hook(lambda module, args, output: made.append(output.detach()))
    return made


# ---------------------------------------------------------------------------------------------------- what is yielded


def test_terms_come_one_graph_at_a_time():
    cfg = tiny_config("--loss_weights.feature_distance=0.005")
    expected = [["source", "feature_distance"], ["target"], ["pull"]]
    assert [list(graph.losses) for graph in tiny_graphs(cfg)] == expected
    for graph in tiny_graphs(cfg):
        for value in graph.losses.values():
            assert value.shape == ()
            assert value.dtype == torch.float32
            assert value.requires_grad


def test_the_log_has_the_losses_and_beside_that_of_the_target_the_trust():
    cfg = tiny_config("--loss_weights.masked_consistency=1")
    logged = [graph.logged for graph in tiny_graphs(cfg)]
    assert [list(numbers) for numbers in logged] == [["source"], ["target", "trust"], ["masked_consistency"], ["pull"]]
    assert not any(value.requires_grad for numbers in logged for value in numbers.values())


def test_what_was_seen_has_no_gradient_and_is_not_copied():
    cfg = tiny_config("--loss_weights.masked_consistency=1")
    batch = tiny_batch(cfg)
    _, seen = together(tiny_graphs(cfg, batch=batch))
    tensors = {name: value for name, value in seen.items() if isinstance(value, Tensor)}
    assert not [name for name, value in tensors.items() if value.requires_grad]
    for name in ("source_images", "source_labels", "target_images"):
        assert seen[name] is getattr(batch, name)


@pytest.mark.parametrize("without", ["target_images", "outer_source", "style_reference"])
def test_what_is_missing_in_the_batch_is_named(without):
    cfg = tiny_config()
    with pytest.raises(ValueError, match="target images" if without == "target_images" else "outer_source"):
        list(tiny_graphs(cfg, batch=replace(tiny_batch(cfg), **{without: None})))


# ---------------------------------------------------------------------------------------------- where gradients go


def gradients_of(term: str, cfg: RunConfig, batch: UdaBatch | None = None) -> tuple[dict[str, bool], Networks]:
    """Which networks of the student have a gradient that is not zero, after one backward of one term."""
    networks = tiny_networks(cfg)
    for graph in tiny_graphs(cfg, networks, batch):
        if term in graph.losses:
            graph.losses[term].backward()
    reached = {
        name: any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        for name, part in networks.student.named_children()
    }
    return reached, networks


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("source", {"segformer": True, "decode_head": True, "projector": False}),
        ("feature_distance", {"segformer": True, "decode_head": False, "projector": False}),
        ("target", {"segformer": True, "decode_head": True, "projector": False}),
        ("pull", {"segformer": True, "decode_head": False, "projector": True}),
    ],
)
def test_each_term_trains_its_own_part_of_the_student_and_nothing_else(term, expected):
    reached, networks = gradients_of(
        term, tiny_config("--loss_weights.feature_distance=0.1", "--feature_distance.classes=[]")
    )
    assert reached == expected
    for frozen in (networks.teacher, networks.imagenet):
        assert all(p.grad is None for p in frozen.parameters())


def test_the_pull_reaches_every_parameter_of_encoder_and_projector():
    _, networks = gradients_of("pull", tiny_config(CALM))
    for name, parameter in networks.student.named_parameters():
        if not name.startswith("decode_head."):
            # k_proj.bias shifts all scores of a softmax alike, so its gradient is rounding.
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


def test_teacher_and_frozen_encoder_are_not_changed():
    cfg = tiny_config("--loss_weights.feature_distance=0.1")
    networks = tiny_networks(cfg)
    before = [p.clone() for part in (networks.teacher, networks.imagenet) for p in part.parameters()]
    for graph in tiny_graphs(cfg, networks):
        sum(graph.losses.values()).backward()
    after = [p for part in (networks.teacher, networks.imagenet) for p in part.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------------ source and its anchor


def test_source_is_the_cross_entropy_of_the_source_crop():
    cfg = tiny_config(CALM)
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    expected = segmentation_loss(networks.student(normalize(batch.source_images)).logits, batch.source_labels)
    assert next(tiny_graphs(cfg, networks, batch)).losses["source"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("classes", "ids"),
    [
        ("[person, car]", (3, 4)),
        ("[train, car]", (4,)),  # a class that the run does not have is left out ...
        ("[train, bus]", ()),  # ... and if it has none of them, no pixel counts
        ("[]", (0, 1, 2, 3, 4, 255)),  # nothing named: every pixel
    ],
)
def test_feature_distance_is_that_of_the_named_classes(classes, ids):
    cfg = tiny_config(CALM, "--loss_weights.feature_distance=0.1", f"--feature_distance.classes={classes}")
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    labels = batch.source_labels.clone()
    labels[0, :, :32] = 4  # whole cells of 32 pixels
    labels[1, :, :32] = 3
    batch = replace(batch, source_labels=labels)
    images = normalize(batch.source_images)
    features = networks.student(images, output_hidden_states=True).hidden_states[-1].detach()
    frozen = networks.imagenet(images).last_hidden_state
    expected = slow_segmentation.feature_distance(features, frozen, labels, ids, 0.75)
    found = next(tiny_graphs(cfg, networks, batch)).losses["feature_distance"]
    assert found.item() == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------ target: mixed images


def teacher_view(networks: Networks, batch: UdaBatch) -> tuple[Tensor, Tensor]:
    """Pseudo-labels and confidence from the teacher's logits, upsampled pixel by pixel."""
    logits = networks.teacher(normalize(batch.target_images)).logits
    probabilities = torch.stack([slow_segmentation.bilinear(image, CROP) for image in logits]).softmax(dim=1)
    confidence, pseudo_labels = probabilities.max(dim=1)
    return pseudo_labels, confidence


@pytest.mark.parametrize("source", ["source", "pseudo_target"])
@pytest.mark.parametrize("scope", ["batch", "image"])
def test_mixed_image_labels_and_weights_are_those_of_the_pixel_loop(source, scope):
    cfg = tiny_config(CALM, PLAIN, f"--mix.source={source}", f"--uda.weight_scope={scope}")
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    pseudo_labels, confidence = teacher_view(networks, batch)
    trust = slow_segmentation.pseudo_label_weights(confidence, 0.6, scope == "image", 2, 4)
    assert 0 < trust.max() < 1  # otherwise the test shows nothing
    given = inputs_of(networks.student)
    losses, seen = together(tiny_graphs(cfg, networks, batch))

    from_source, labels, weights = seen["from_source"], seen["mixed_labels"], seen["mixed_weights"]
    pasted = batch.source_images
    if source == "pseudo_target":
        pasted = batch.crop_inner(networks.translate(batch.outer_source, batch.style_reference, Generator()))
    for index in range(2):
        drawn = batch.source_labels[index][from_source[index]].unique().tolist()
        expected = slow_mixing.class_mix(
            pasted[index],
            batch.target_images[index],
            batch.source_labels[index],
            pseudo_labels[index],
            trust[index],
            drawn,
        )
        torch.testing.assert_close(given[1][index], normalize(expected[0][None])[0])
        assert torch.equal(labels[index], expected[1])
        torch.testing.assert_close(weights[index], expected[2])
    assert torch.equal(given[1], normalize(seen["mixed_images"]))
    torch.testing.assert_close(losses["target"], segmentation_loss(seen["mixed_logits"], labels, weights))
    assert seen["trust"].item() == pytest.approx(trust.mean().item(), rel=1e-5)


def test_the_mixed_image_is_augmented_and_its_labels_are_not():
    cfg = tiny_config(CALM, "--augment={jitter_probability: 1, blur_probability: 1}")
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    plain = tiny_config(CALM, PLAIN)
    inputs, seen = [], []
    for one in (cfg, plain):
        networks = tiny_networks(one)
        inputs.append(inputs_of(networks.student))
        seen.append(together(tiny_graphs(one, networks, batch))[1])
    assert not torch.allclose(inputs[0][1], inputs[1][1], atol=0.01)
    assert torch.equal(inputs[0][0], inputs[1][0])  # the source is never augmented
    for name in ("mixed_labels", "mixed_weights"):
        assert torch.equal(seen[0][name], seen[1][name])


# ----------------------------------------------------------------------------------------- pull: against the twin


def small(maps: Tensor) -> Tensor:
    """Labels at the size of the embeddings: stride 4, the first pixel of each block."""
    return maps[:, ::4, ::4]


def expected_importance(cfg: RunConfig, networks: Networks, batch: UdaBatch, queried: list[int]) -> list[float]:
    pseudo_labels, confidence = teacher_view(networks, batch)
    members = [name in (cfg.pull.class_set or cfg.classes) for name in cfg.classes]
    weights = [inside / sum(members) for inside in members]
    if cfg.drw.apply_to == "pull":
        confidences = [slow.mean_confidence(pseudo_labels, confidence, class_id) for class_id in range(K)]
        weights = slow.drw(confidences, cfg.drw.beta, members)
    if cfg.drw.normalise_over == "queried":
        weights = [weight / sum(weights[c] for c in queried) for weight in weights]
    return weights


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["--pull.objective=mse"],
        ["--pull.reduction=sum_paper"],
        ["--pull.reduction=mean_paper"],
        ["--pull.share_negatives=query"],
        ["--pull.negatives=pooled"],
        ["--pull={query_sampling: ceqs, num_queries: 3}"],
        ["--pull.unreliable_ratio=0.1"],
        ["--pull.temperature=0.05"],
        ["--pull.class_set=[road, sky, person]"],
        ["--pull.class_set=[road, sky, person]", "--pull.reduction=sum_paper"],
        ["--drw.apply_to=none"],
        ["--drw.apply_to=target"],
        ["--drw.normalise_over=queried"],
        ["--drw={normalise_over: queried, apply_to: none}", "--pull.class_set=[road, sky, person]"],
        ["--drw.beta=2"],
        ["--loss_weights.target=0"],
    ],
    ids=lambda overrides: " ".join(overrides) or "default",
)
def test_pull_equals_the_twin_on_the_teachers_keys(overrides):
    """Keys, queries, prototypes, sets of negatives, weights and the sum are all computed again, from the images."""
    cfg = tiny_config(CALM, *overrides)
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    batch.source_labels[batch.source_labels == 1] = 255  # a class that sends no queries
    losses, seen = together(tiny_graphs(cfg, networks, batch))
    samples = listed(seen["samples"])

    labels = small(batch.source_labels)
    pseudo_labels, confidence = (small(maps) for maps in teacher_view(networks, batch))
    members = [c for c in range(K) if cfg.classes[c] in (cfg.pull.class_set or cfg.classes)]
    counts = [int((labels == c).sum()) if c in members else 0 for c in range(K)]
    if cfg.pull.query_sampling == "cbqs":
        wanted = slow.cbqs(counts, len(members), cfg.pull.num_queries)
    else:
        wanted = [cfg.pull.num_queries if count else 0 for count in counts]
    assert samples.classes == [c for c in range(K) if wanted[c]]
    assert [len(rows) for rows in samples.queries] == [wanted[c] for c in samples.classes]

    queries, negatives = {}, {}
    for class_id, rows, from_source, from_target in zip(*vars(samples).values(), strict=True):
        assert (labels.flatten()[rows] == class_id).all()
        assert set(from_source.flatten().tolist()) <= slow.source_negatives(labels, class_id)
        allowed = slow.target_negatives(pseudo_labels, confidence, cfg.pull.unreliable_ratio, class_id)
        assert set(from_target.flatten().tolist()) <= allowed
        assert from_source.shape[-1] + from_target.shape[-1] == cfg.pull.num_negatives
        own = [(s.expand(len(rows), -1) if s.ndim == 1 else s).tolist() for s in (from_source, from_target)]
        queries[class_id], negatives[class_id] = rows.tolist(), list(zip(*own, strict=True))

    keys_s = networks.teacher(normalize(batch.source_images), project=True).embeddings.double()
    keys_t = networks.teacher(normalize(batch.target_images), project=True).embeddings.double()
    prototypes = torch.zeros(K, cfg.projector.dim, dtype=torch.float64)
    for class_id in samples.classes:
        prototypes[class_id] = slow.prototype(keys_s, labels, class_id)
    styled = [
        fda(*(m[i].double().numpy() for m in (batch.outer_source, batch.style_reference)), 4, 4)[0] for i in range(2)
    ]
    pseudo_target = batch.crop_inner(torch.from_numpy(np.stack(styled)).float())
    with torch.no_grad():
        embeddings = networks.student(normalize(pseudo_target), project=True, segment=False).embeddings.double()
    expected = slow.pull_loss(
        embeddings,
        keys_s,
        keys_t,
        prototypes,
        queries,
        negatives,
        expected_importance(cfg, networks, batch, samples.classes),
        cfg.pull.temperature,
        cfg.pull.objective,
        cfg.pull.reduction,
        len(members),
    )
    assert losses["pull"].item() == pytest.approx(expected.item(), rel=2e-4)


def test_the_pseudo_target_is_the_crop_of_the_translated_window():
    cfg = tiny_config(CALM)
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    seen = inputs_of(networks.student)
    list(tiny_graphs(cfg, networks, batch))
    assert len(seen) == 3
    for index, (top, left) in enumerate(batch.inner_corner.tolist()):
        window = fda(batch.outer_source[index].double().numpy(), batch.style_reference[index].double().numpy(), 4, 4)[0]
        crop = torch.from_numpy(window[:, top : top + CROP[0], left : left + CROP[1]]).float()
        torch.testing.assert_close(seen[2][index], normalize(crop[None])[0], rtol=1e-4, atol=1e-4)


def test_without_an_engine_the_pull_is_from_source_to_source():
    cfg = tiny_config(CALM, "--translate.engine=none")
    networks = tiny_networks(cfg)
    seen = inputs_of(networks.student)
    batch = replace(tiny_batch(cfg), outer_source=None, style_reference=None, inner_corner=None)
    list(tiny_graphs(cfg, networks, batch))
    assert torch.equal(seen[2], seen[0])


def test_pseudo_targets_are_augmented_on_demand_only():
    inputs = []
    for augment in ("false", "true"):
        cfg = tiny_config(CALM, "--augment.jitter_probability=1", f"--pull.augment={augment}")
        networks = tiny_networks(cfg)
        inputs.append(inputs_of(networks.student))
        list(tiny_graphs(cfg, networks))
    assert torch.equal(inputs[0][1], inputs[1][1])
    assert not torch.allclose(inputs[0][2], inputs[1][2], atol=0.01)


def test_the_teacher_normalises_the_domains_apart_unless_told_otherwise():
    made = []
    for forward in ("separate", "joint"):
        cfg = tiny_config(CALM, f"--pull.teacher_forward={forward}")
        networks = tiny_networks(cfg)
        made.append(embeddings_of(networks.teacher))
        list(tiny_graphs(cfg, networks))
    cfg = tiny_config(CALM)
    batch, teacher = tiny_batch(cfg), tiny_networks(cfg).teacher
    keys_s = teacher(normalize(batch.source_images), project=True).embeddings
    keys_t = teacher(normalize(batch.target_images), project=True).embeddings
    both = teacher(normalize(torch.cat([batch.source_images, batch.target_images])), project=True).embeddings
    separate, joint = made[0][::-1], made[1][0].split(2)  # the target comes first
    for keys, expected in ((separate, (keys_s, keys_t)), (joint, (both[:2], both[2:]))):
        torch.testing.assert_close(keys, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(separate[0], joint[0])


def test_labels_by_share_leave_out_mixed_cells():
    cfg = tiny_config(CALM, "--pull.label_downscale=ratio")
    batch = tiny_batch(cfg)
    labels = batch.source_labels.clone()
    labels[:, ::4, ::4] = 0  # one pixel in 16: the nearest label is always road, the share hardly changes
    samples = listed(together(tiny_graphs(cfg, batch=replace(batch, source_labels=labels)))[1]["samples"])
    blocks = batch.source_labels[:, ::4, ::4].flatten()
    for class_id, rows in zip(samples.classes, samples.queries, strict=True):
        assert (blocks[rows] == class_id).all()


# ---------------------------------------------------------------------------- class weights and what is remembered


def test_drw_on_the_target_weighs_pseudo_labels_by_class_with_mean_one():
    for overrides in ((), ("--pull.class_set=[road, building, sky]",)):
        cfg = tiny_config(CALM, PLAIN, "--drw.apply_to=target", *overrides)
        batch, networks = tiny_batch(cfg), tiny_networks(cfg)
        pseudo_labels, confidence = teacher_view(networks, batch)
        trust = slow_segmentation.pseudo_label_weights(confidence, 0.6, False, 2, 4)
        members = [name in (cfg.pull.class_set or cfg.classes) for name in cfg.classes]
        confidences = [slow.mean_confidence(pseudo_labels, confidence, class_id) for class_id in range(K)]
        factors = sum(members) * torch.tensor(slow.drw(confidences, 0.5, members))
        assert factors.sum().item() == pytest.approx(sum(members), rel=1e-5)
        _, seen = together(tiny_graphs(cfg, networks, batch))
        expected = torch.where(seen["from_source"], 1.0, trust * factors[pseudo_labels])
        torch.testing.assert_close(seen["mixed_weights"], expected)
        assert seen["class_weights"].tolist() == pytest.approx([inside / sum(members) for inside in members])


@pytest.mark.parametrize("threshold", [0.6, 1.0])  # 1: no pixel is sure, so the trust is 0 everywhere
def test_the_valid_mask_leaves_out_rows_and_not_unsure_pixels(threshold):
    cfg = tiny_config(CALM, "--drw.use_valid_mask=true", f"--uda.pseudo_threshold={threshold}")
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    pseudo_labels, confidence = (maps[:, 2:-4] for maps in teacher_view(networks, batch))
    expected = slow.drw([slow.mean_confidence(pseudo_labels, confidence, class_id) for class_id in range(K)], 0.5)
    _, seen = together(tiny_graphs(cfg, networks, batch))
    assert seen["class_weights"].tolist() == pytest.approx(expected, rel=1e-4)


def test_confidences_of_absent_classes_are_remembered():
    cfg = tiny_config(CALM, "--drw.absent_conf=ema")
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    with torch.no_grad():
        networks.teacher.decode_head.classifier.bias[0] = -100  # never predicted
    memory = ClassMemory(K, cfg.projector.dim)
    memory.confidences[:] = 0.8
    pseudo_labels, confidence = teacher_view(networks, batch)
    confidences = [slow.mean_confidence(pseudo_labels, confidence, class_id) for class_id in range(K)]
    assert confidences[0] is None
    _, seen = together(tiny_graphs(cfg, networks, batch, memory=memory))
    used = [0.8 if value is None else value for value in confidences]
    assert seen["class_weights"].tolist() == pytest.approx(slow.drw(used, 0.5), rel=1e-4)
    kept = [0.8 if value is None else 0.99 * 0.8 + 0.01 * value for value in confidences]
    assert memory.confidences.tolist() == pytest.approx(kept, rel=1e-5)


def test_prototypes_are_remembered():
    cfg = tiny_config(CALM, "--pull.proto_momentum=0.9")
    networks, memory = tiny_networks(cfg), ClassMemory(K, cfg.projector.dim)
    expected, known = torch.zeros(K, cfg.projector.dim, dtype=torch.float64), set()
    for seed in range(3):
        batch = tiny_batch(cfg, seed)
        batch.source_labels[batch.source_labels == seed] = 255  # each time another class is missing
        keys = networks.teacher(normalize(batch.source_images), project=True).embeddings.double()
        _, seen = together(tiny_graphs(cfg, networks, batch, memory=memory))
        for class_id in range(K):
            new = slow.prototype(keys, small(batch.source_labels), class_id)
            if new is not None:
                expected[class_id] = 0.9 * expected[class_id] + 0.1 * new if class_id in known else new
                known.add(class_id)
        torch.testing.assert_close(seen["prototypes"].double(), expected, rtol=1e-4, atol=1e-5)


def test_without_memory_nothing_is_remembered():
    cfg = tiny_config()
    memory = ClassMemory(K, cfg.projector.dim)
    list(tiny_graphs(cfg, memory=memory))
    assert all((buffer == 0).all() for buffer in memory.buffers())


def test_memory_is_saved_and_loaded_as_a_model():
    memory = ClassMemory(K, 3)
    memory.remember_prototypes(torch.ones(K, 3), torch.arange(K) < 2, 0.5)
    memory.remember_confidences(torch.ones(K), torch.arange(K) < 2)
    copied = ClassMemory(K, 3)
    copied.load_state_dict(memory.state_dict())
    assert copied.seen.tolist() == [True, True, False, False, False]
    assert all(torch.equal(a, b) for a, b in zip(memory.buffers(), copied.buffers(), strict=True))


# --------------------------------------------------------------------------------------------------- randomness


def test_equal_seeds_give_equal_losses_and_others_do_not():
    cfg = tiny_config()
    first, again, other = all_losses(cfg, seed=1), all_losses(cfg, seed=1), all_losses(cfg, seed=2)
    assert first == again
    assert first["target"] != other["target"]
    assert first["pull"] != other["pull"]


def test_the_objective_draws_from_its_generator_alone():
    """What is left to torch's global generator is dropout and drop path, which are off here."""
    cfg = tiny_config(CALM, "--pull.share_negatives=query")
    step = tiny_step(cfg)
    state = torch.get_rng_state()
    list(t2sda_losses(step))
    assert torch.equal(torch.get_rng_state(), state)


class Draws(TorchFunctionMode):
    """Notes every draw from one generator: the function, and the shape of what it returns."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator, self.seen = generator, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("generator") is self.generator:
            self.seen.append((func.__name__, "any" if func.__name__ == "randperm" else tuple(result.shape)))
        return result


def special_batches(cfg: RunConfig) -> dict[str, UdaBatch]:
    batch = tiny_batch(cfg)
    return {
        "ordinary": batch,
        "another": tiny_batch(cfg, 1),
        "one class": replace(batch, source_labels=torch.full_like(batch.source_labels, 2)),
        "all ignored": replace(batch, source_labels=torch.full_like(batch.source_labels, 255)),
        "black target": replace(batch, target_images=torch.zeros_like(batch.target_images)),
    }


def test_the_order_of_draws_does_not_depend_on_the_data():
    """Mixing, augmentation, then that of the pull; its samples have a generator of their own."""
    cfg = tiny_config("--augment={jitter_probability: 1, blur_probability: 1}", "--pull.augment=true")
    orders = []
    for batch in special_batches(cfg).values():
        step = tiny_step(cfg, batch=batch)
        graphs = t2sda_losses(step)
        with Draws(step.generator) as draws:
            next(graphs)
            assert draws.seen == []
            next(graphs)
            before_pull = list(draws.seen)
            next(graphs)
        augmentation = [("rand", (2,))] * 5 + [("randperm", "any"), ("rand", (2,))]  # coins, factors, order, sigmas
        assert before_pull == [("randperm", "any")] * 2 + augmentation  # a set of classes per image first
        after = draws.seen[len(before_pull) :]
        assert after == augmentation
        orders.append(draws.seen)
    assert all(order == orders[0] for order in orders)


# ------------------------------------------------------------------------------- unusual batches, several processes


@pytest.mark.parametrize("name", ["one class", "all ignored", "black target"])
@pytest.mark.parametrize("objective", ["infonce", "mse"])
def test_losses_of_unusual_batches_are_finite_and_connected(name, objective):
    cfg = tiny_config("--loss_weights.feature_distance=0.1", f"--pull.objective={objective}")
    networks = tiny_networks(cfg)
    for graph in tiny_graphs(cfg, networks, special_batches(cfg)[name]):
        total = sum(graph.losses.values())
        assert torch.isfinite(total)
        total.backward()
    assert all(torch.isfinite(p.grad).all() for p in networks.student.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in networks.student.projector.parameters())


def test_a_batch_without_labels_teaches_nothing_on_the_source():
    cfg = tiny_config()
    values = all_losses(cfg, batch=special_batches(cfg)["all ignored"])
    assert values["source"] == 0
    assert values["pull"] == 0


def test_sums_over_processes_are_asked_for_equally_often_whatever_the_batch_shows():
    cfg = tiny_config()
    asked = []
    for batch in special_batches(cfg).values():
        shapes: list[tuple[int, ...]] = []

        def note(statistics: Tensor, into: list[tuple[int, ...]] = shapes) -> Tensor:
            into.append(tuple(statistics.shape))
            return statistics

        list(tiny_graphs(cfg, batch=batch, sum_over_processes=note))
        asked.append(shapes)
    assert asked == [[(2, K), (K,), (K, cfg.projector.dim)]] * len(asked)


def test_two_processes_with_the_same_batch_see_what_one_sees():
    """Shares, prototypes and confidences are ratios of sums, so doubling the sums changes nothing."""
    cfg = tiny_config()
    twice = all_losses(cfg, sum_over_processes=lambda statistics: 2 * statistics)
    assert twice == pytest.approx(all_losses(cfg), rel=1e-6)


def test_two_processes_with_an_image_each_have_the_gradients_of_one_with_both(monkeypatch):
    """Oracle: mean of the processes' gradients = gradient of the joined batch, with batch norm and samples held."""
    cfg = tiny_config(CALM, "--loss_weights.target=0", "--pull.share_negatives=query", "--translate.engine=none")
    whole = replace(tiny_batch(cfg), outer_source=None, style_reference=None, inner_corner=None)
    whole.source_labels[1] = whole.source_labels[0].flip(-1)  # as many pixels of every class in both images
    images = {name: value for name, value in vars(whole).items() if isinstance(value, Tensor)}
    halves = [UdaBatch(**{name: value[[index]] for name, value in images.items()}) for index in (0, 1)]
    drawn: list[PullSamples] = []
    sample_pull = pull.sample_pull

    def remember(*args: Any, **kwargs: Any) -> PullSamples:
        drawn.append(sample_pull(*args, **kwargs))
        return drawn[-1]

    def joined(*args: Any, **kwargs: Any) -> PullSamples:
        """Those of both halves; rows of the second lie behind the pixels of the first."""
        first, second = (listed(samples) for samples in drawn[-2:])
        assert first.classes == second.classes
        pixels = args[0].order.shape[1] // 2
        rows = (
            [torch.cat([a, b + pixels]) for a, b in zip(getattr(first, name), getattr(second, name), strict=True)]
            for name in ("queries", "source_negatives", "target_negatives")
        )
        return blocked(Listed(first.classes, *rows), K)

    def gradients(batch: UdaBatch, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        networks = tiny_networks(cfg)
        networks.student.eval()
        networks.teacher.eval()
        for graph in tiny_graphs(cfg, networks, batch, sum_over_processes=sum_over_processes):
            sum(graph.losses.values()).backward()
        return {name: p.grad for name, p in networks.student.named_parameters() if p.grad is not None}

    monkeypatch.setattr(pull, "sample_pull", remember)
    own: list[list[Tensor]] = [[], []]
    for half, into in zip(halves, own, strict=True):
        gradients(half, lambda statistics, into=into: into.append(statistics) or statistics)
    sums = [a + b for a, b in zip(*own, strict=True)]
    apart = [
        gradients(half, lambda _, left=left: next(left))
        for half, left in zip(halves, map(iter, [sums] * 2), strict=True)
    ]
    monkeypatch.setattr(pull, "sample_pull", joined)
    together = gradients(whole, alone)
    assert set(together) == set(apart[0])
    for name, gradient in together.items():
        torch.testing.assert_close((apart[0][name] + apart[1][name]) / 2, gradient, rtol=1e-4, atol=1e-5)
    assert max((apart[0][name] - apart[1][name]).abs().max() for name in together) > 1e-3


def test_target_labels_have_no_way_in():
    """No argument of the objective carries them: the batch has no field, and networks and config hold no data."""
    cfg = tiny_config()
    batch = tiny_batch(cfg)
    tensors = {name for name, value in vars(batch).items() if isinstance(value, Tensor) and value.dtype == torch.int64}
    assert tensors == {"source_labels", "inner_corner"}
    assert [name for name in vars(batch) if "label" in name] == ["source_labels"]


def test_the_objective_is_known_by_name():
    assert METHODS["t2sda"] is t2sda_losses


# -------------------------------------------------------------------------------------------------------- learning


def test_pulling_lowers_the_loss_and_turns_queries_to_their_prototypes():
    """Updates on one batch, with the pull and without: with it the cosine between q and k⁺ ends higher."""
    cosines, values = {}, {}
    for weight in (0.0, 1.0):
        cfg = tiny_config(CALM, "--loss_weights.target=0")
        batch, networks = tiny_batch(cfg), tiny_networks(cfg)
        optimizer = torch.optim.AdamW(networks.student.parameters(), lr=2e-3)
        embeddings = embeddings_of(networks.student)
        values[weight] = []
        for _ in range(25):
            losses, seen = together(tiny_graphs(cfg, networks, batch))
            (losses["source"] + weight * losses["pull"]).backward()
            values[weight].append(losses["pull"].item())
            optimizer.step()
            optimizer.zero_grad()
        samples, prototypes, pixels = listed(seen["samples"]), seen["prototypes"], as_pixels(embeddings[-1])
        each = [
            F.cosine_similarity(pixels[rows], prototypes[class_id], dim=-1).mean().item()
            for class_id, rows in zip(samples.classes, samples.queries, strict=True)
        ]
        cosines[weight] = sum(each) / len(each)
    assert values[1.0][-1] < 0.9 * values[1.0][0]
    assert values[1.0][-1] < values[0.0][-1]
    assert cosines[1.0] > cosines[0.0]
