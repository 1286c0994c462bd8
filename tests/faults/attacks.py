"""Rows of the campaign where somebody else wrote the files: code in checkpoints, names that lead outside."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from arena import log_of, outcome, sign, signal_self
from PIL import Image
from rows import RESUME, Row, Yard, at_update, checkpoints

from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import load_domain
from t2sda_hf.models import T2SDAForSemanticSegmentation
from t2sda_hf.training.checkpoint import MANIFEST, DamagedCheckpoint, read_checkpoint


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.path}'",)


def payloads(yard: Yard, trials: int) -> Row:
    """Code in every place of a checkpoint, with a manifest that fits: it never runs; the run is right or refused."""
    row, out, mark = Row("malicious checkpoint"), yard.folder / "payload", yard.folder / "owned"
    assert yard.run(out, plant=at_update(7, signal_self(signal.SIGTERM))) == 143
    bomb = pickle.dumps(_Touch(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the payload itself must work"
    mark.unlink()
    python = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\n"
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForSemanticSegmentation": "evil.Evil"}

    def file(name: str, data: bytes) -> Callable[[Path], object]:
        return lambda checkpoint: (checkpoint / name).write_bytes(data)

    def mapped(part: str) -> Callable[[Path], None]:
        def plant(checkpoint: Path) -> None:
            config = json.loads((checkpoint / part / "config.json").read_text())
            (checkpoint / part / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
            (checkpoint / part / "evil.py").write_text(python)

        return plant

    def instead(checkpoint: Path) -> None:
        (checkpoint / "teacher" / "model.safetensors").unlink()
        (checkpoint / "teacher" / "pytorch_model.bin").write_bytes(bomb)

    def yaml(checkpoint: Path) -> None:
        text = f"seed: !!python/object/apply:os.system ['touch {mark}']\n"
        (checkpoint.parent / "resolved_config.yaml").write_text(text)

    plants: dict[str, Callable[[Path], object]] = {
        "optimizer.bin": file("optimizer.bin", bomb),
        "random_states_0.pkl": file("random_states_0.pkl", bomb),
        "custom_checkpoint_0.pkl": file("custom_checkpoint_0.pkl", bomb),
        "training_args.bin": file("training_args.bin", bomb),
        "weights beside safetensors": file("student/pytorch_model.bin", bomb),
        "weights instead of safetensors": instead,
        "auto_map of the student": mapped("student"),
        "auto_map of the teacher": mapped("teacher"),
        "pickle as state.json": file("state.json", bomb),
        "pickle as safetensors": file("optimizer.safetensors", bomb),
        "huge header": file("student/model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        "yaml tag": yaml,
    }
    expected, _ = yard.undisturbed()
    step = -(-len(plants) // trials)
    for name, plant in list(plants.items())[step - 1 :: step]:
        place = yard.folder / "attacked"
        shutil.copytree(out, place)
        for checkpoint in checkpoints(place / "t2sda"):
            plant(checkpoint)
            sign(checkpoint)
        code = yard.run(place, *RESUME)
        text = log_of(place).read_text()
        refused = code == 2 and "Traceback" not in text
        if mark.exists():
            row.count("silent", f"{name}: the code ran")
            mark.unlink()
        else:
            right = refused or (code == 0 and outcome(place) == expected)
            row.count("survived" if right else "lost", f"{name}: exit {code}: {text[-600:]}")
        yard.clear(place)
    yard.clear(out)
    return row


def escapes(yard: Yard, trials: int) -> Row:
    """Names in manifests and data folders, and links, that lead outside: refused, and nothing outside is changed."""
    row, out = Row("names that lead outside"), yard.folder / "escape"
    outside = yard.folder / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("{}")
    Image.new("RGB", (64, 64)).save(outside / "secret.png")
    assert yard.run(out, plant=at_update(7, signal_self(signal.SIGTERM))) == 143
    newest = checkpoints(out / "t2sda")[-1]

    def listed(name: str) -> Callable[[Path], None]:
        def attack(place: Path) -> None:
            checkpoint = place / newest.name
            listing = json.loads((checkpoint / MANIFEST).read_text())
            digest = hashlib.sha256(b"{}").hexdigest()
            (checkpoint / MANIFEST).write_text(json.dumps(listing | {name: {"bytes": 2, "sha256": digest}}))
            read_checkpoint(checkpoint, T2SDAForSemanticSegmentation)

        return attack

    def linked(name: str, folder: bool = False) -> Callable[[Path], None]:
        def attack(place: Path) -> None:
            path = place / newest.name / name
            target = outside / path.name
            shutil.copytree(path, target) if folder else shutil.copy(path, target)
            shutil.rmtree(path) if folder else path.unlink()
            path.symlink_to(target)
            try:
                read_checkpoint(place / newest.name, T2SDAForSemanticSegmentation)
            finally:
                shutil.rmtree(target) if folder else target.unlink()

        return attack

    def imagefolder(name: str) -> Callable[[Path], None]:
        def attack(place: Path) -> None:
            data = place / "data"
            data.mkdir()
            Image.new("RGB", (64, 64)).save(data / "a.png")
            (data / "metadata.csv").write_text(f"file_name,label_file_name\na.png,{name}\n")
            domain = load_domain(DomainConfig(path=str(data)), ("road", "sky"))
            domain.labels(0)

        return attack

    attacks: dict[str, Callable[[Path], None]] = {
        f"manifest lists {name}": listed(name)
        for name in (
            "../secret.json",
            "../../outside/secret.json",
            "student/../../../outside/secret.json",
            str(outside / "secret.json"),
            "./../" * 3 + "outside/secret.json",
            "..",
            "/",
        )
    }
    attacks |= {f"{name} is a link": linked(name) for name in ("optimizer.safetensors", "state.json", "manifest.json")}
    attacks |= {f"{name}/ is a link": linked(name, folder=True) for name in ("student", "teacher")}
    attacks |= {
        f"metadata lists {name}": imagefolder(name)
        for name in ("../../outside/secret.png", str(outside / "secret.png"), "x/../../../outside/secret.png")
    }
    for name, attack in list(attacks.items())[:trials]:
        place = yard.folder / "escaping"
        shutil.copytree(out / "t2sda", place)
        before = _tree(outside)
        try:
            attack(place)
        except (DamagedCheckpoint, ValueError) as error:
            row.count("survived" if _tree(outside) == before else "lost", f"{name}: {error}")
        else:
            row.count("silent", f"{name}: not refused")
        shutil.rmtree(place)
    yard.clear(out)
    return row


def cells(yard: Yard, trials: int) -> Row:
    """Cells that point to other files, addresses or devices: refused with their row before anything is opened."""
    row, asked = Row("cells that point outside"), list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    secret = yard.folder / "secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/x.png"
        places = [str(secret), "../secret.png", address, f"zip://x.png::{address}", f"reference::{address}",
                  f"file://{secret}", "memory://x.png", "hf://datasets/a/b/x.png", "/dev/zero",
                  "/etc/passwd"]  # fmt: skip
        for index, (place, streaming) in enumerate(product(places, (False, True))):
            if index >= trials:
                break
            data = yard.folder / f"cells_{index}"
            data.mkdir()
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({"image": pa.array([{"bytes": None, "path": place}], type=kind)})
            pq.write_table(table, data / "train-0.parquet")
            try:
                load_domain(DomainConfig(path=str(data), streaming=streaming), ("a", "b"), labelled=False)
            except ValueError as error:
                refused = "row 0 of" in str(error) and "no file of this data set" in str(error) and not asked
                row.count("survived" if refused else "lost", f"{place}: {error} {asked}")
            else:
                row.count("silent", f"{place}: not refused")
        server.shutdown()
        thread.join()
    return row


def _tree(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
