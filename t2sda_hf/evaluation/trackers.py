"""Pictures for the trackers that show pictures; accelerate's own interface covers numbers only."""

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Give a PNG to every running tracker of TensorBoard, wandb, trackio and MLflow; other trackers are left alone.

    Args:
        accelerator: with its trackers running.
        name: what the picture is called there.
        path: of the PNG.
        step: number of finished updates.
    """
    for tracker in accelerator.trackers:
        running: Any = tracker
        if tracker.name in ("tensorboard", "wandb"):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            running.log_images({name: pixels}, step=step, **options)
        elif tracker.name == "trackio":
            import trackio

            running.log({name: trackio.Image(str(path))}, step=step)
        elif tracker.name == "mlflow":
            running.log_artifact(str(path), artifact_path=name)
