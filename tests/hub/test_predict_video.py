"""Needs the extra `video`."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2sda_hf.cli import main
from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import load_domain
from t2sda_hf.files import VideoFrames

av = pytest.importorskip("av", reason="needs the extra `video`")


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    with av.open(path, "w") as target:
        stream = target.add_stream("libx264", rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        target.mux(stream.encode(None))


def test_every_frame_gets_its_ids_and_the_overlay_is_a_video_of_the_same_length(
    finished_run: Path, tmp_path: Path
) -> None:
    frames = [np.full((64, 96, 3), 30 * number, np.uint8) for number in range(5)]
    write_video(tmp_path / "drive.mp4", frames)
    student, out = str(finished_run / "t2sda" / "student"), tmp_path / "out"
    assert main(["predict", student, str(tmp_path / "drive.mp4"), "--output", str(out), "--confidence"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "drive_confidence",
        "drive_ids",
        "drive_overlay.mp4",
        "legend.png",
    ]
    for kind in ("ids", "confidence"):
        assert sorted(path.name for path in (out / f"drive_{kind}").iterdir()) == [f"{n:06}.png" for n in range(5)]
    with av.open(out / "drive_overlay.mp4") as overlay:
        assert overlay.streams.video[0].average_rate == 10
        assert [frame.to_ndarray(format="rgb24").shape for frame in overlay.decode(video=0)] == [(64, 96, 3)] * 5
    # Frame by frame what the command says of the same picture in a file.
    picture = next(VideoFrames(str(tmp_path / "drive.mp4")))
    Image.fromarray(picture).save(tmp_path / "frame.png")
    assert main(["predict", student, str(tmp_path / "frame.png"), "--output", str(tmp_path / "one")]) == 0
    with Image.open(tmp_path / "one" / "frame_ids.png") as one, Image.open(out / "drive_ids" / "000000.png") as first:
        np.testing.assert_array_equal(np.array(one), np.array(first))


def test_a_file_that_is_no_video_is_named(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drive.mp4").write_bytes(b"not a video")
    words = [str(finished_run / "t2sda" / "student"), str(tmp_path / "drive.mp4"), "--output", str(tmp_path / "out")]
    assert main(["predict", *words]) == 2
    assert "drive.mp4 is not a video that can be read" in capsys.readouterr().err


def test_a_portrait_video_of_a_phone_is_upright_everywhere(finished_run: Path, tmp_path: Path) -> None:
    """Its frames lie on their side, and a display matrix says so."""
    path, one = tmp_path / "phone.mp4", 65536
    write_video(path, [np.full((64, 96, 3), (200, 0, 0), np.uint8)] * 2)
    data = bytearray(path.read_bytes())
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 0x40000000)
    place = data.find(plain, data.find(b"tkhd"))
    data[place : place + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 * one, 0, 0x40000000)
    path.write_bytes(data)
    assert load_domain(DomainConfig(path=str(path)), ("a", "b"), labelled=False).image(0).shape == (96, 64, 3)
    out = tmp_path / "out"
    assert main(["predict", str(finished_run / "t2sda" / "student"), str(path), "--output", str(out)]) == 0
    with Image.open(out / "phone_ids" / "000000.png") as first:
        assert first.size == (64, 96)
    with av.open(out / "phone_overlay.mp4") as overlay:
        assert next(overlay.decode(video=0)).to_ndarray(format="rgb24").shape == (96, 64, 3)


def test_a_video_that_was_cut_in_half_is_named(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "whole.mkv", list(noise))
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        load_domain(DomainConfig(path=str(tmp_path / "half.mkv"), frame_step=2), ("a", "b"), labelled=False)
        assert "half.mkv ends after" in caplog.text
        assert "of 40 frames: it is cut or damaged" in caplog.text
    caplog.clear()
    load_domain(DomainConfig(path=str(tmp_path / "whole.mkv")), ("a", "b"), labelled=False)
    assert "frames" not in caplog.text
    words = [str(finished_run / "t2sda" / "student"), str(tmp_path / "half.mkv"), "--output", str(tmp_path / "out")]
    assert main(["predict", *words]) == 1
    printed = capsys.readouterr()
    assert "1 of 1 files in" in printed.out
    assert re.search(r"1 could be read in part, .*:\n.*half.mkv ends after \d+ of 40 frames: it is cut", printed.err)
    assert (tmp_path / "out" / "legend.png").is_file()
    assert (tmp_path / "out" / "half_ids" / "000000.png").is_file()
