"""Checkpoint folders: whole or absent, believed only byte by byte, loaded entirely or not at all."""

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model, tiny_networks
from torch import Tensor, nn

from t2sda_hf import storage
from t2sda_hf.evaluation.watch import Watch
from t2sda_hf.methods import ClassMemory
from t2sda_hf.models import T2SDAForSemanticSegmentation
from t2sda_hf.storage import write_text
from t2sda_hf.training import resume
from t2sda_hf.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    DamagedCheckpoint,
    checkpoint_folder,
    checkpoints,
    keep_newest,
    newest_valid,
    optimizer_tensors,
    read_checkpoint,
    sweep,
    verify,
    write_checkpoint,
    write_folder,
)
from t2sda_hf.training.optim import make_optimizer
from t2sda_hf.training.parts import Parts
from t2sda_hf.training.resume import load_run


def stepped(seed: int, steps: int = 2) -> Parts:
    """Networks, a watch, and an optimiser that has made some steps on made-up gradients."""
    cfg = tiny_config()
    networks, memory = tiny_networks(cfg, seed), ClassMemory(len(cfg.classes), cfg.projector.dim)
    watch = Watch([1] * len(cfg.classes), 0.5)
    memory.seen[1], watch.shares[2] = steps > 0, steps
    optimizer = make_optimizer(networks.student.encoder, networks.student, cfg.optim)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in networks.student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
    return Parts(networks, memory, optimizer, watch)


def write(folder: Path, step: int, parts: Parts, watch: str = "watch") -> Path:
    target = checkpoint_folder(folder, step)
    own = {f"memory.{name}": buffer for name, buffer in parts.memory.named_buffers()}
    own |= {f"{watch}.{name}": buffer for name, buffer in parts.watch.named_buffers()}
    write_checkpoint(
        target,
        save=lambda network, path: network.save_pretrained(path),
        student=parts.networks.student,
        teacher=parts.networks.teacher,
        optimizer=optimizer_tensors(parts.networks.student, parts.optimizer),
        processes=[{**own, "log.source": torch.tensor([0.1, 1e-30])}],
        state={"method": "t2sda", "step": step, "skipped": 0},
    )
    return target


def everything(parts: Parts) -> dict[str, Tensor]:
    named = dict(optimizer_tensors(parts.networks.student, parts.optimizer))
    modules = {"student": parts.networks.student, "teacher": parts.networks.teacher, **parts.own}
    for part, module in modules.items():
        named |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    return {name: value.clone() for name, value in named.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints 9 and 10. Not to be changed."""
    folder = tmp_path_factory.mktemp("kept")
    for step in (9, 10):
        write(folder, step, stepped(step))
    return folder


@pytest.fixture
def copy(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "run"))


def test_what_is_written_is_read_into_another_run(kept: Path) -> None:
    written = everything(stepped(10))
    parts = stepped(3, steps=0)
    before = everything(parts)
    for name in ("student.decode_head.classifier.weight", "memory.seen", "watch.shares"):
        assert not torch.equal(before[name], written[name])
    progress = load_run(checkpoint_folder(kept, 10), parts, Accelerator(cpu=True))
    assert_equal(everything(parts), written)
    assert progress.step == 10
    assert torch.equal(progress.log["source"], torch.tensor([0.1, 1e-30]))

    # The next step is the one the other run would have made.
    other = stepped(10)
    for one in (parts, other):
        random = torch.Generator().manual_seed(1)
        for parameter in one.networks.student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        one.optimizer.step()
    assert_equal(everything(parts), everything(other))


def test_a_checkpoint_in_which_the_watch_is_a_part_of_the_memory_is_read(tmp_path: Path) -> None:
    """So it was written until the watch had a name of its own."""
    folder = write(tmp_path, 10, stepped(10), watch="memory.watch")
    assert "0/memory.watch.shares" in load_file(folder / "processes.safetensors")
    parts = stepped(3, steps=0)
    load_run(folder, parts, Accelerator(cpu=True))
    assert_equal(everything(parts), everything(stepped(10)))


def test_a_file_system_without_rights_ends_no_save(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(shutil, "copymode", denied)
    storage.share_weights(kept)
    assert not (kept / ".rights").exists()


def test_a_group_may_read_all_of_it_if_the_umask_lets_it(kept: Path) -> None:
    os.umask(forbidden := os.umask(0))
    allowed = 0o666 & ~forbidden
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.rglob("*") if path.is_file()} == {allowed}


def test_a_checkpoint_holds_safetensors_and_json_and_nothing_else_that_is_read(kept: Path) -> None:
    files = {path.suffix for path in kept.rglob("*") if path.is_file()}
    assert files <= {".safetensors", ".json", ".py"}  # .py: the code beside the weights, for the Hub
    folder = checkpoint_folder(kept, 10)
    listed = json.loads((folder / MANIFEST).read_text())
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert listed.keys() == there - {MANIFEST}


def test_student_and_teacher_are_from_pretrained_folders(kept: Path) -> None:
    networks = stepped(9).networks
    for part, network in (("student", networks.student), ("teacher", networks.teacher)):
        loaded = T2SDAForSemanticSegmentation.from_pretrained(checkpoint_folder(kept, 9) / part)
        assert_equal(dict(loaded.state_dict()), dict(network.state_dict()))


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("change", [cut, flip, None], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize(
    "name",
    ["student/model.safetensors", "teacher/model.safetensors", "teacher/config.json", "optimizer.safetensors",
     "processes.safetensors", "state.json", MANIFEST],
)  # fmt: skip
def test_damage_is_named_and_the_one_before_is_taken(
    copy: Path, name: str, change: Callable[[bytes], bytes] | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint_folder(copy, 10) / name
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
    with pytest.raises(DamagedCheckpoint, match=name):
        read_checkpoint(checkpoint_folder(copy, 10), T2SDAForSemanticSegmentation)
    with caplog.at_level(logging.WARNING):
        found = newest_valid(copy)
    assert found is not None
    assert (found[0].name, found[1]["step"]) == ("checkpoint-000009", 9)
    assert name in caplog.text
    assert "checkpoint-000009" in caplog.text
    assert (copy / "damaged-checkpoint-000010").is_dir()
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-000009"]


def test_if_all_are_damaged_nothing_starts_anew_and_nothing_is_renamed(copy: Path) -> None:
    for step in (9, 10):
        (checkpoint_folder(copy, step) / "state.json").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint .* is damaged"):
        newest_valid(copy)
    assert len(checkpoints(copy)) == 2


def test_no_checkpoint_is_none_and_strangers_are_not_counted(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints", "checkpoint-final", "checkpoint-", ".checkpoint-000007.partial", "student"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-000003").write_text("a file")
    assert checkpoints(tmp_path) == []
    assert newest_valid(tmp_path) is None


def test_another_format_is_not_guessed(copy: Path) -> None:
    folder = checkpoint_folder(copy, 10)

    def rewrite(state: dict) -> None:
        def fill(target: Path) -> None:
            for path in folder.rglob("*"):
                if path.is_file() and path.name != MANIFEST:
                    (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                    (target / path.relative_to(folder)).write_bytes(path.read_bytes())
            (target / "state.json").write_text(json.dumps(state))

        write_folder(copy / "checkpoint-000011", fill)

    rewrite({"format": 2, "step": 11})
    with pytest.raises(DamagedCheckpoint, match="format 2"):
        verify(copy / "checkpoint-000011")


@pytest.mark.parametrize("part", ["student", "teacher", "optimizer"])
def test_a_load_that_fails_changes_nothing(kept: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = stepped(3)
    before, randomness = everything(parts), torch.get_rng_state()
    content = read_checkpoint(checkpoint_folder(kept, 10), T2SDAForSemanticSegmentation)
    monkeypatch.setattr(resume, "read_checkpoint", lambda *_: content)
    tensors = getattr(content, part)
    last = sorted(tensors)[-1]
    good = tensors[last]
    for wrong, words in (
        (good[None], "is .* in the checkpoint"),
        (good.double(), "float64|is .*"),
        (None, "is only in"),
    ):
        if wrong is None:
            del tensors[last]
        else:
            tensors[last] = wrong
        with pytest.raises(DamagedCheckpoint, match=words):
            load_run(checkpoint_folder(kept, 10), parts, Accelerator(cpu=True))
        assert_equal(everything(parts), before)
    assert torch.equal(torch.get_rng_state(), randomness)


@pytest.mark.parametrize("where", ["student", "teacher", "optimizer"])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, where: str) -> None:
    parts = stepped(0)
    tensors = {
        "student": parts.networks.student.decode_head.classifier.weight.data,
        "teacher": parts.networks.teacher.decode_head.classifier.weight.data,
        "optimizer": next(iter(parts.optimizer.state.values()))["exp_avg_sq"],
    }
    tensors[where].view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match=f"{where} tensor .* not finite"):
        write(tmp_path, 1, parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_folder_is_told_once(copy: Path, code: int, caplog, monkeypatch) -> None:
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    storage._tell_about_folders.cache_clear()
    monkeypatch.setattr(os, "fsync", only_files)
    write(copy, 11, stepped(1))
    assert verify(checkpoint_folder(copy, 11))["step"] == 11
    assert caplog.text.count("fsync of a folder is not possible") == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_gives_one_error_and_leaves_what_was_there(
    copy: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    parts = stepped(1)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="MB are free") as caught:
        write(copy, 11, parts)
    assert os.strerror(code) in str(caught.value)
    assert sorted(path.name for path in copy.iterdir()) == ["checkpoint-000009", "checkpoint-000010"]
    assert verify(checkpoint_folder(copy, 10))["step"] == 10


def test_a_folder_of_the_same_name_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "student"
    write_folder(target, lambda folder: (folder / "old").write_text("1"), manifest=False)
    write_folder(target, lambda folder: (folder / "new").write_text("2"), manifest=False)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]

    def fail(folder: Path) -> None:
        (folder / "newer").write_text("3")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(CheckpointError):
        write_folder(target, fail)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_an_error_that_is_not_the_disk_s_is_not_disguised(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        write_folder(tmp_path / "x", fail)
    assert not (tmp_path / "x").exists()


def test_the_newest_by_step_are_kept_whatever_the_clock_said(tmp_path: Path) -> None:
    for age, step in enumerate((2, 10, 999_999, 1_000_000)):  # one more digit sorts differently as text
        checkpoint_folder(tmp_path, step).mkdir()
        os.utime(checkpoint_folder(tmp_path, step), (1e9 - age * 1e6,) * 2)
    keep_newest(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-999999", "checkpoint-1000000"]
    keep_newest(tmp_path, 5)
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    stay = {"checkpoint-000003", "damaged-checkpoint-000004", ".lock", ".git", "student", "my.partial"}
    for name in stay | {".checkpoint-000005.partial", ".checkpoint-000001.deleted", ".student.replaced"}:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == stay


def test_a_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    write_text(path, "new ä")
    assert path.read_text(encoding="utf-8") == "new ä"

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="full"):
        write_text(path, "newest")
    assert path.read_text(encoding="utf-8") == "new ä"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_names_of_the_optimiser_are_those_of_the_parameters() -> None:
    student: nn.Module = tiny_model()
    optimizer = make_optimizer(student.encoder, student, tiny_config().optim)
    assert optimizer_tensors(student, optimizer) == {}
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    expected = {
        f"{name}/{what}" for name, _ in student.named_parameters() for what in ("step", "exp_avg", "exp_avg_sq")
    }
    assert optimizer_tensors(student, optimizer).keys() == expected
