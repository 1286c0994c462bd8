"""Rows of the campaign where the machine or somebody else ends a run: workers, files, terminals, launchers, disks."""

import errno
import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from arena import STEPS, Plant, finish, log_of, outcome, signal_self, spread, states, wait_for, when_training
from PIL import Image
from rows import RESUME, Row, Yard, at_update
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from t2sda_hf.commands import train
from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import check_domain, load_domain
from t2sda_hf.data.pairs import PairDataset
from t2sda_hf.evaluation.run_folder import read_method
from t2sda_hf.masking import _MaskedStream
from t2sda_hf.training import build


def workers_killed(yard: Yard, trials: int) -> Row:
    """A data worker is killed at any position, as when memory runs out: said, and no finished update is lost."""
    row, out = Row("data worker killed"), yard.folder / "worker"
    for position in spread(trials, 1, STEPS, yard.random):

        def plant(at: int = int(position)) -> None:
            _MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)  # seconds between looks
            _at_position(at, signal_self(signal.SIGKILL))

        code = yard.run(out, "--data.num_workers", "1", plant=plant)
        text = log_of(out).read_text()
        if code != 1 or "a worker that reads data was ended by SIGKILL" not in text or "Traceback" in text:
            row.count("silent", f"position {int(position)}: exit {code}: {text[-600:]}")
            yard.clear(out)
        else:
            yard.judge(row, out, note=f"worker killed at position {int(position)}")
    return row


def files_vanish(yard: Yard, trials: int) -> Row:
    """Images go in the middle of a run: one is replaced, said and counted; all of them end it with a checkpoint."""
    row, out = Row("images vanish"), yard.folder / "vanish"
    for index, position in enumerate(spread(trials, 1, STEPS - 2, yard.random)):
        gone = range(6) if index % 2 else range(3)

        def plant(at: int = int(position), gone: range = gone) -> None:
            sample, draw, now = PairDataset._sample, PairDataset._draw_target, [0]

            def counted(self: PairDataset, rng: object, *which: object) -> object:
                now[0] += 1
                return sample(self, rng, *which)

            def drawn(self: PairDataset, target: object, rng: object, *which: object) -> object:
                number = int(deepcopy(rng).integers(len(target)))
                if now[0] > at and number in gone:
                    raise ValueError(f"street {number} is gone")
                return draw(self, target, rng, *which)

            PairDataset._sample, PairDataset._draw_target = counted, drawn

        code = yard.run(out, plant=plant)
        text = log_of(out).read_text()
        note = f"{len(gone)} gone from {int(position)}: exit {code}: {text[-600:]}"
        if index % 2:
            if code != 1 or "DataFailed: ValueError: street" not in text or "Traceback" in text:
                row.count("silent", note)
                yard.clear(out)
            else:
                yard.judge(row, out, note=note)
            continue
        listed = len(read_method(out / "t2sda").unreadable)
        said = text.count("another image is drawn for one that cannot be read any more")
        row.count("survived" if code == 0 and said == listed else "silent", note)
        yard.clear(out)
    return row


def hang_ups(yard: Yard, trials: int) -> Row:
    """SIGHUP after any update, with a terminal that takes no more text: a checkpoint of the last update."""

    def closed() -> None:
        _masked()
        _nobody_reads()

    return _ends_by(yard, trials, Row("terminal closed"), (signal.SIGHUP,), closed)


def slurm_signals(yard: Yard, trials: int) -> Row:
    """SIGUSR1 after any update, and then SIGTERM during the save."""
    return _ends_by(yard, trials, Row("Slurm's signals"), (signal.SIGUSR1, signal.SIGTERM), lambda: None)


def _ends_by(yard: Yard, trials: int, row: Row, numbers: tuple[int, ...], before: Plant) -> Row:
    out = yard.folder / "hang"
    for stop in spread(trials, 1, STEPS, yard.random):

        def plant(stop: int = int(stop)) -> None:
            before()
            at_update(stop, lambda: [signal_self(number)() for number in numbers])()

        code = yard.run(out, plant=plant)
        if code != 128 + numbers[-1] or int(stop) not in states(out):
            row.count("lost", f"after {int(stop)}: exit {code}: {log_of(out).read_text()[-600:]}")
            yard.clear(out)
        else:
            yard.judge(row, out, note=f"after {int(stop)}")
    return row


def broken_pipes(yard: Yard, trials: int) -> Row:
    """Nobody reads what a run prints, from any update on: it goes on to the end, and its result is the same."""
    row, out = Row("stdout and stderr closed"), yard.folder / "pipe"
    expected, _ = yard.undisturbed()
    for update in spread(trials, 1, STEPS, yard.random):

        def plant(update: int = int(update)) -> None:
            _masked()
            at_update(update, _nobody_reads)()

        code = yard.run(out, plant=plant)
        same = code == 0 and outcome(out) == expected
        row.count("survived" if same else "lost", f"from update {int(update)} on: exit {code}")
        yard.clear(out)
    return row


def launchers_ended(yard: Yard, trials: int) -> Row:
    """The parent of a run is told to end, hung up or killed: nobody is left writing, and the run can go on."""
    row, out = Row("launcher ended"), yard.folder / "launched"
    long = ("--train.max_steps", "40", "--train.save_every", "30", "--train.evaluate_every", "100")
    ours = [sys.executable, "-m", "t2sda_hf"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", "-m", "t2sda_hf", "train", "--config"]
    folder = ("--output_dir", str(out))
    single = out / yard.config.stem / "seed_0"
    cases: list[tuple[str, list[str], int, Path, bool]] = [
        ("repeat", [*ours, "repeat", str(yard.config), "--seeds", "0", "--output", str(out)], number, single, False)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    ]
    several = [*ours, "train", "--config", str(yard.config), *folder, "--cpu", "--num_processes", "2"]
    cases += [("two processes", several, number, out, True) for number in (signal.SIGTERM, signal.SIGHUP)]
    cases += [("accelerate launch", [*accelerate, str(yard.config), *folder], signal.SIGTERM, out, False)]
    for name, command, number, place, two in cases[:trials]:
        with log_of(out).open("w") as log:
            parent = subprocess.Popen([*command, *long], stdout=log, stderr=log)
        scalars = place / "t2sda" / "scalars.jsonl"
        while not (scalars.exists() and scalars.stat().st_size) and parent.poll() is None:
            time.sleep(0.05)
        parent.send_signal(number)
        code, note = parent.wait(), f"{name}, {signal.Signals(number).name}"
        waited = time.monotonic()
        while _writers(out) and time.monotonic() - waited < 60:
            assert number == signal.SIGKILL or name == "accelerate launch", f"{note}: {_writers(out)} left"
            time.sleep(0.05)
        if _writers(out) or not states(place):
            row.count("lost", f"{note}: exit {code}, {_writers(out)} left: {log_of(out).read_text()[-600:]}")
            yard.clear(out)
        elif place != out:
            moved = yard.folder / "alone"
            place.rename(moved)
            yard.judge(row, moved, *long, note=note)
            yard.clear(out)
        else:
            yard.judge(row, out, *long, two=two, note=note)
    return row


def _writers(out: Path) -> list[int]:
    """Processes that have a folder in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(out) in words:
            found.append(int(process.name))
    return found


def foreign_runs(yard: Yard, trials: int) -> Row:
    """The folder of a run is removed and taken by another run: the first one writes nothing into it, and says so."""
    row, out = Row("another run in the folder"), yard.folder / "foreign"
    expected, _ = yard.undisturbed()
    marker = yard.folder / "taken"
    for update in spread(trials, 1, STEPS, yard.random):
        marker.unlink(missing_ok=True)
        stopped = yard.folder / "stopped"
        stopped.unlink(missing_ok=True)

        def plant(update: int = int(update), stopped: Path = stopped) -> None:
            def pause() -> None:
                stopped.touch()
                wait_for(marker)

            at_update(update, pause)()

        first = yard.start(out, plant=plant)
        wait_for(stopped)
        log = log_of(out).rename(log_of(out).with_suffix(".first"))
        shutil.rmtree(out)
        second = yard.start(out, plant=when_training(marker))
        codes = finish(first), finish(second)
        said = log.read_text()
        note = f"after update {int(update)}: exit {codes}: {said[-600:]}"
        if codes[0] != 1 or "LostFolder: " not in said or "Traceback" in said:
            row.count("silent", note)
        else:
            row.count("survived" if codes[1] == 0 and outcome(out) == expected else "mixed", note)
        yard.clear(out)
        log.unlink()
    return row


def cluster_disks(yard: Yard, trials: int) -> Row:
    """No flock, no fsync of folders: said once, and stopped or killed the run goes on to the same result."""
    row, out = Row("cluster file systems"), yard.folder / "cluster"
    codes = [(errno.ENOSYS, errno.EINVAL), (errno.ENOTSUP, errno.ENOTSUP), (errno.ENOLCK, errno.EINVAL)]
    expected, _ = yard.undisturbed()
    for index, stop in enumerate(spread(trials, 1, STEPS, yard.random)):
        lock, sync = codes[index % len(codes)]
        number = (signal.SIGTERM, signal.SIGKILL)[index % 2]

        def limits(lock: int = lock, sync: int = sync) -> None:
            fsync = os.fsync

            def flock(*_: object) -> None:
                raise OSError(lock, os.strerror(lock))

            def only_files(descriptor: int) -> None:
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    raise OSError(sync, os.strerror(sync))
                fsync(descriptor)

            fcntl.flock, os.fsync = flock, only_files

        def plant(stop: int = int(stop), number: int = number, limits: Plant = limits) -> None:
            limits()
            at_update(stop, signal_self(number))()

        code = yard.run(out, plant=plant)
        again = yard.run(out, *RESUME, plant=limits)
        text = log_of(out).read_text()
        note = f"{errno.errorcode[lock]}, {signal.Signals(number).name}: exit {code}, then {again}: {text[-600:]}"
        if text.count("has no locks") != 2 or "fsync of a folder is not possible" not in text:
            row.count("silent", note)
        else:
            right = code in (143, -9) and again == 0 and outcome(out) == expected
            row.count("survived" if right else "lost", note)
        yard.clear(out)
    return row


def full_at_the_start(yard: Yard, trials: int) -> Row:
    """A disk that is full when a run begins: one line, and with room the same command starts it. Needs a mount."""
    row, place = Row("disk full at the start"), yard.folder / "tight"
    place.mkdir()
    out = place / "out"
    expected, _ = yard.undisturbed()
    for index in range(trials):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * (index + 2)}k", "tmpfs", place]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            row.notes.append("not run: no right to mount a disk")
            break
        try:
            out.mkdir()
            log_of(out).symlink_to(yard.folder / "tight.log")  # not on this disk
            (yard.folder / "tight.log").unlink(missing_ok=True)
            code = yard.run(out, "--resume", "auto")
            text = log_of(out).read_text()
            subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
            again = yard.run(out, *RESUME)
            note = f"{4 * (index + 2)} kB: exit {code}, then {again}: {text[-500:]}"
            if code not in (1, 2) or "Traceback" in text:
                row.count("silent", note)
            else:
                row.count("survived" if again == 0 and outcome(out) == expected else "lost", note)
        finally:
            subprocess.run(["umount", place], check=True)
    return row


def exchanged_data(yard: Yard, trials: int) -> Row:
    """Target images are exchanged under a stopped run: refused with their number, and with the old ones it goes on."""
    row, out, data = Row("data exchanged"), yard.folder / "exchanged", yard.folder / "photos"
    data.mkdir()
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (64, 96, 3), dtype=np.uint8)) for _ in range(9)]
    for index in range(6):
        pictures[index].save(data / f"{index}.png")
    mine = ("--target", f"{{path: {data}, num_images: 6}}")

    def reads() -> None:
        train.open_domains = build.open_domains

    assert yard.run(out, *mine, plant=reads) == 0
    expected = outcome(out)
    yard.clear(out)
    for index, stop in enumerate(spread(trials, 1, STEPS - 1, yard.random)):

        def plant(stop: int = int(stop)) -> None:
            reads()
            at_update(stop, signal_self(signal.SIGTERM))()

        stopped = yard.run(out, *mine, plant=plant)
        before, number = states(out), 1 + index % 3
        for other in range(number):
            pictures[6 + other].save(data / f"{other}.png")
        code = yard.run(out, *mine, *RESUME, plant=reads)
        said = log_of(out).read_text()
        kept = states(out) == before
        for other in range(number):
            pictures[other].save(data / f"{other}.png")
        again = yard.run(out, *mine, *RESUME, plant=reads)
        note = f"{number} exchanged after {int(stop)}: exits {stopped}, {code}, {again}: {said[-600:]}"
        if code != 2 or f"{number} of 6" not in said or "Traceback" in said:
            row.count("silent", note)
        else:
            row.count("survived" if kept and again == 0 and outcome(out) == expected else "lost", note)
        yard.clear(out)
    return row


def cells_outside(yard: Yard, trials: int) -> Row:
    """Cells of a parquet file that point out of its folder: refused with their row, and nothing is opened."""
    row, data = Row("cells that point outside"), yard.folder / "cells"
    data.mkdir()
    secret = yard.folder / "cell.png"
    Image.new("RGB", (64, 64)).save(secret)
    (data / "link.png").symlink_to(secret)
    places = [str(secret), "../cell.png", "link.png", f"file://{secret}", "http://127.0.0.1:9/x.png", "memory://x.png"]
    places += ["reference://x.png", f"zip://x.png::{secret}", "/dev/zero", "/etc/passwd", "x/../../cell.png", "~/x.png"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for place in places[:trials]:
        cells = [{"bytes": secret.read_bytes(), "path": None}, {"bytes": None, "path": place}]
        pq.write_table(pa.table({"image": pa.array(cells, type=kind)}), data / "train-00000-of-00001.parquet")
        try:
            load_domain(DomainConfig(path=str(data)), ("road", "sky"), labelled=False).image(1)
        except ValueError as error:
            row.count("survived" if "row 1" in str(error) else "lost", f"{place}: {error}")
        else:
            row.count("silent", f"{place}: not refused")
    return row


def damaged_caches(yard: Yard, trials: int) -> Row:
    """What is remembered of a data set is cut, emptied or has a wrong bit: said, set aside, and made again."""
    row, data, said = Row("damaged caches"), yard.folder / "cached", list[str]()
    random = np.random.default_rng(0)
    for name, size in (("images", (32, 32, 3)), ("labels", (32, 32))):
        (data / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(random.integers(0, 2, size, dtype=np.uint8)).save(data / name / f"{index}.png")
    classes = ("road", "sky")
    config = DomainConfig(path=str(data / "images"), label_path=str(data / "labels"), class_names=classes)
    domain, usual = load_domain(config, classes), datasets.config.HF_DATASETS_CACHE
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("t2sda_hf").addHandler(handler)
    datasets.config.HF_DATASETS_CACHE = yard.folder / "cache"
    try:
        expected = check_domain(domain, classes)
        for index in range(trials):
            (file,) = (yard.folder / "cache" / "t2sda_hf").glob("*.json")
            whole = file.read_bytes()
            at = yard.random.randrange(len(whole))
            flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            kind, damage = (("cut", whole[:at]), ("emptied", b""), ("bit flipped", flipped))[index % 3]
            file.write_bytes(damage)
            said.clear()
            again = check_domain(domain, classes)
            if not any("damaged" in text for text in said):
                row.count("silent", f"{kind} at {at}")
            else:
                row.count("survived" if (again == expected).all() else "lost", f"{kind} at {at}")
    finally:
        datasets.config.HF_DATASETS_CACHE = usual
        logging.getLogger("t2sda_hf").removeHandler(handler)
    return row


def _at_position(position: int, do: Plant) -> None:
    sample = PairDataset.__getitem__

    def planted(self: PairDataset, index: int) -> object:
        if index == position:
            do()
        return sample(self, index)

    PairDataset.__getitem__ = planted


def _masked() -> None:
    """As every door of the package does."""
    sys.stdout, sys.stderr = _MaskedStream(sys.stdout), _MaskedStream(sys.stderr)


def _nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
