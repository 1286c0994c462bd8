import json
import multiprocessing
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import fork
from torch import nn

from t2sda_hf.errors import NotFinite
from t2sda_hf.evaluation.confusion import confusion_matrix
from t2sda_hf.evaluation.evaluator import Tally, evaluate_model, evaluate_models, readable_part
from t2sda_hf.evaluation.inference import predict_labels, to_pixel_values
from t2sda_hf.evaluation.table import format_table

CLASSES = ("road", "sky", "car")


class QuarterResolution(nn.Module):
    """Three classes from a random convolution with dropout, at a quarter of the input's size."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, 4, 4, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=F.conv2d(self.dropout(pixel_values), self.weight, stride=4))


class RandomDomain:
    """Images of different sizes with random labels, a fifth of them ignored. `reads` lists what was asked for."""

    name = "random"

    def __init__(self, num_images=5, num_classes=3):
        self.num_images, self.num_classes, self.reads = num_images, num_classes, []

    def __len__(self):
        return self.num_images

    def image(self, index):
        self.reads.append(index)
        return self._draw(index, 256, (*self._size(index), 3))

    def labels(self, index):
        labels = self._draw(index + 100, self.num_classes, self._size(index))
        labels[self._draw(index + 200, 5, self._size(index)) == 0] = 255
        return labels

    def _size(self, index):
        return 40 + 3 * index, 64 - index

    def _draw(self, seed, high, shape):
        return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


class ColorIsClass(nn.Module):
    """Reads the class off the channel that is brightest: right on every image of `ColoredDomain`."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.scale * pixel_values)


class ColoredDomain:
    """One image: left half road, right half car, and no sky."""

    name = "colored"

    def __len__(self):
        return 1

    def image(self, index):
        return (255 * np.eye(3, dtype=np.uint8))[self.labels(index)]

    def labels(self, index):
        return np.repeat([[0] * 32 + [2] * 32], 48, axis=0).astype(np.uint8)


def run(model=None, domain=None, **arguments):
    model = QuarterResolution() if model is None else model
    domain = RandomDomain() if domain is None else domain
    return evaluate_model(model, domain, **{"image_size": (32, 64), "classes": CLASSES, "progress": False} | arguments)


def test_perfect_prediction_scores_hundred_and_an_absent_class_is_none():
    result = run(ColorIsClass(), ColoredDomain(), image_size=None)

    assert result["domain"] == "colored"
    assert result["num_images"] == 1
    assert result["miou"] == result["pixel_accuracy"] == result["mean_accuracy"] == 100
    assert result["iou"] == {"road": 100, "sky": None, "car": 100}
    assert result["confusion"] == [[32 * 48, 0, 0], [0, 0, 0], [0, 0, 32 * 48]]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_matrix_is_the_sum_over_images_predicted_one_by_one_at_the_size_of_their_labels():
    domain, model = RandomDomain(), QuarterResolution().eval()
    expected = 0
    for index in range(5):
        labels = domain.labels(index)
        pixel_values = to_pixel_values(domain.image(index), (32, 64), torch.device("cpu"))
        predictions = predict_labels(model, pixel_values, labels.shape)
        expected = expected + confusion_matrix(predictions[0], labels, 3)

    assert run(model)["confusion"] == expected.tolist()
    valid = sum(int((domain.labels(index) != 255).sum()) for index in range(5))
    assert expected.sum() == valid


def test_sliding_windows_reach_the_network():
    result = run(image_size=None, mode="slide", window=(32, 32), stride=(16, 16))
    assert result["confusion"] != run(image_size=None)["confusion"]


def test_limit_scores_only_the_first_images():
    domain = RandomDomain()

    result = run(domain=domain, limit=2)

    assert domain.reads == [0, 1]
    assert result["num_images"] == 2
    assert run(limit=99)["num_images"] == 5


def test_model_is_in_eval_mode_meanwhile_and_gets_back_the_mode_of_every_part():
    model = QuarterResolution().train()
    model.dropout.eval()
    seen = []
    model.register_forward_hook(lambda module, _, output: seen.append((module.training, output.logits.requires_grad)))

    first, second = run(model), run(model.train())

    assert set(seen) == {(False, False)}
    assert first == second
    assert model.training


def test_frozen_parts_stay_in_eval_mode_also_after_an_error():
    model = QuarterResolution().train()
    model.dropout.eval()

    with pytest.raises(ValueError, match="random, image 0: labels contain 3"):
        run(model, RandomDomain(num_classes=4))

    assert model.training
    assert not model.dropout.training


def test_sharded_processes_see_every_image_once_and_sum_to_the_whole():
    class Rank:
        """What evaluate_model uses of an Accelerator, for one process of three; reduce keeps the own share."""

        num_processes, device = 3, torch.device("cpu")

        def __init__(self, index):
            self.process_index = index

        def reduce(self, matrix, reduction):
            assert reduction == "sum"
            return matrix

    domain = RandomDomain()
    shares = [run(domain=domain, accelerator=Rank(index)) for index in range(3)]

    assert sorted(domain.reads) == [0, 1, 2, 3, 4]
    assert np.sum([share["confusion"] for share in shares], axis=0).tolist() == run()["confusion"]


def test_image_and_labels_of_different_sizes_are_an_error():
    domain = ColoredDomain()
    domain.labels = lambda index: np.zeros((48, 63), np.uint8)
    domain.image = lambda index: np.zeros((48, 64, 3), np.uint8)

    with pytest.raises(ValueError, match=r"colored, image 0: the image has \(48, 64\) pixels, its labels \(48, 63\)"):
        run(domain=domain)


@pytest.mark.parametrize("arguments", [{"domain": RandomDomain(0)}, {"limit": 0}])
def test_nothing_to_evaluate_is_an_error(arguments):
    with pytest.raises(ValueError, match="nothing to evaluate: random has"):
        run(**arguments)


class Damaged(RandomDomain):
    """The second image is cut, the labels of the third are gone."""

    def image(self, index):
        if index == 1:
            raise ValueError("row 1 is cut")
        return super().image(index)

    def labels(self, index):
        if index == 2:
            raise OSError("row 2 is gone")
        return super().labels(index)


def test_what_cannot_be_read_is_listed_and_the_rest_scored():
    with pytest.raises(ValueError, match="row 1 is cut"):
        run(domain=Damaged())
    model = QuarterResolution()
    result = run(model, Damaged(), skip_unreadable=True)
    assert result["unreadable"] == ["row 1 is cut", "row 2 is gone"]
    assert result["num_images"] == len(Damaged()) - 2
    part, unreadable = readable_part(Damaged())
    assert unreadable == result["unreadable"]
    assert part.indices == [index for index in range(len(Damaged())) if index not in (1, 2)]
    assert run(model, part)["confusion"] == result["confusion"]


def test_nothing_that_can_be_read_is_an_error():
    class Gone(RandomDomain):
        def image(self, index):
            raise OSError("no such file")

    message = f"none of the {len(Gone())} images of .* can be .*no such file"
    with pytest.raises(ValueError, match=message):
        readable_part(Gone())
    with pytest.raises(ValueError, match=message):
        run(domain=Gone(), skip_unreadable=True)


def test_progress_is_shown_on_request(capsys):
    run(progress=False)
    assert capsys.readouterr().err == ""
    run(progress=True)
    assert "evaluate random: 100%" in capsys.readouterr().err


def test_table_shows_models_side_by_side():
    scores = {"pixel_accuracy": 90.0, "mean_accuracy": 80.0}
    table = format_table(
        {
            "source only": {"miou": 43.216, "iou": {"road": 80.0, "traffic light": 6.432, "sky": None}, **scores},
            "T2S-DA": {"miou": 100.0, "iou": {"road": 100.0, "traffic light": 100.0}, **scores},
        }
    )

    assert table.splitlines() == [
        "| class          | source only | T2S-DA |",
        "| :------------- | ----------: | -----: |",
        "| road           |       80.00 | 100.00 |",
        "| traffic light  |        6.43 | 100.00 |",
        "| sky            |           - |      - |",
        "| mIoU           |       43.22 | 100.00 |",
        "| pixel accuracy |       90.00 |  90.00 |",
        "| mean accuracy  |       80.00 |  80.00 |",
    ]


TWO_PROCESSES = """
import importlib.util, json, sys

from accelerate import Accelerator

spec = importlib.util.spec_from_file_location("test_evaluator", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

accelerator = Accelerator()
assert accelerator.num_processes == 2, accelerator.num_processes
model = accelerator.prepare_model(tests.QuarterResolution(), evaluation_mode=True)
result = tests.run(model, accelerator=accelerator)
with open(f"{sys.argv[2]}/{accelerator.process_index}.json", "w") as file:
    json.dump(result, file)
accelerator.end_training()
"""


@pytest.mark.two_processes
def test_five_images_on_two_processes_equal_one_process(tmp_path):
    script = tmp_path / "evaluate_on_two.py"
    script.write_text(TWO_PROCESSES)
    fork(2, str(script), __file__, str(tmp_path))
    expected = run()
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_logits_that_are_not_finite_name_the_image_and_leave_the_model_as_it_was():
    class Sometimes(ColorIsClass):
        def forward(self, pixel_values):
            broken = pixel_values.shape[-2] > 46  # the fourth of `RandomDomain`
            return SimpleNamespace(logits=self.scale * pixel_values / (0.0 if broken else 1.0))

    model = Sometimes().train()
    with pytest.raises(NotFinite, match=r"^random, image 3: what the network makes of it is NaN or infinite"):
        evaluate_model(model, RandomDomain(), image_size=None, classes=CLASSES, progress=False)
    assert model.training


class TwoSizes(RandomDomain):
    def _size(self, index):
        return (44, 60) if index % 3 else (40, 64)


def test_images_of_one_size_are_forwarded_together():
    model, numbers = QuarterResolution(), []
    model.register_forward_pre_hook(lambda _, given: numbers.append(len(given[0])))
    alone = run(model, TwoSizes(7))
    assert numbers == [1] * 7
    numbers.clear()
    assert run(model, TwoSizes(7), at_once=3) == alone
    assert numbers == [3, 3, 1]  # images 1, 2 and 4; 0, 3 and 6; what is left


def test_where_they_do_not_fit_together_they_are_forwarded_one_by_one():
    class Large(QuarterResolution):
        def forward(self, pixel_values):
            numbers.append(len(pixel_values))
            if len(pixel_values) > 1:
                raise torch.OutOfMemoryError("tried to allocate 20 GiB")
            return super().forward(pixel_values)

    numbers = []
    assert run(Large(), TwoSizes(7), at_once=3) == run(QuarterResolution(), TwoSizes(7))
    assert numbers == [3] + [1] * 7  # what did not fit is not tried again


class EqualLabels(RandomDomain):
    def _size(self, index):
        return 40, 64


def test_one_that_is_not_finite_is_named_among_others():
    spoiled = to_pixel_values(EqualLabels().image(3), (32, 64), torch.device("cpu"))

    class Sometimes(ColorIsClass):
        def forward(self, pixel_values):
            broken = (pixel_values == spoiled).all(dim=(1, 2, 3), keepdim=True)
            return SimpleNamespace(logits=self.scale * pixel_values.masked_fill(broken, torch.nan))

    how = {"image_size": (32, 64), "classes": CLASSES, "progress": False, "at_once": 5}
    with pytest.raises(NotFinite, match=r"^random, image 3: what the network makes of it is NaN or infinite"):
        evaluate_model(Sometimes(), EqualLabels(), **how)


def test_models_that_are_scored_together_read_every_image_once():
    domain, models = RandomDomain(), {"one": QuarterResolution(), "two": ColorIsClass()}
    how = {"image_size": (32, 64), "classes": CLASSES, "progress": False}
    together = evaluate_models(models, domain, **how)
    assert domain.reads == [0, 1, 2, 3, 4]
    for name, model in models.items():
        assert together[name] == run(model)
    checked = []
    evaluate_models(models, domain, **how, check=lambda: checked.append(len(domain.reads)))
    assert checked == [5, 6, 7, 8, 9]


def test_images_that_other_processes_read_give_the_same_scores():
    class Holed(RandomDomain):
        def image(self, index):
            if index == 3:
                raise OSError("image 3 is gone")
            return super().image(index)

    alarm = signal.getsignal(signal.SIGCHLD)
    assert run(workers=2) == run()
    result = run(domain=Holed(), workers=2, skip_unreadable=True)
    assert result == run(domain=Holed(), skip_unreadable=True)
    assert result["unreadable"] == ["image 3 is gone"]
    with pytest.raises(OSError, match=r"^image 3 is gone$"):
        run(domain=Holed(), workers=2)
    assert signal.getsignal(signal.SIGCHLD) == alarm
    assert multiprocessing.active_children() == []


def test_counts_that_stay_on_a_device_are_those_of_every_image():
    on_host, on_device = Tally(203, 3, "random"), Tally(203, 3, "random")
    on_device._pairs = torch.zeros(100, 256, 256, dtype=torch.int64)  # as after the first image of a GPU
    for index in range(0, 203, 7):
        labels = np.random.default_rng(index).choice([0, 1, 2, 255], (6, 8)).astype(np.uint8)
        predictions = torch.from_numpy(np.random.default_rng(-index % 99).integers(0, 3, (6, 8), dtype=np.uint8))
        on_host.add(index, predictions, labels)
        on_device.add(index, predictions, labels)
    for found, expected in zip(on_device.read(), on_host.read(), strict=True):
        assert (found == expected).all()
    spoiled = Tally(203, 3, "random")
    spoiled._pairs = torch.zeros(100, 256, 256, dtype=torch.int64)
    spoiled.add(7, predictions + 1, labels)
    with pytest.raises(ValueError, match="random, one of the images 7 to 8: labels or predictions contain ids"):
        spoiled.read()
