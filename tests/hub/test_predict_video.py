"""Needs the extra `video`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2sda_hf.cli import main

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
    with av.open(tmp_path / "drive.mp4") as video:
        picture = next(video.decode(video=0)).to_ndarray(format="rgb24")
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
    assert "drive.mp4 cannot be read as a video" in capsys.readouterr().err
