"""The page that shows what models see in an image, how sure they are, and how large every class is.

A Space of the Hub gets a copy of this file as its app.py, and there is nothing else of ours: so it imports libraries
only. settings.json beside the copy names the models, which come with their own code. `t2sda demo` shows the same page
on this machine.
"""

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

VIEWS = ("classes", "confidence")
FILES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # others that Pillow knows start programs (EPS: Ghostscript)
PIXELS = 2**25  # larger pictures are not decoded: a few bytes of a file can be gigabytes in memory
ASPECT = 16  # longer side over shorter side
SCORES = 2**26  # pixels times classes that are held; larger pictures are shrunk


def load(name: str, remote_code: bool) -> tuple[Any, Any, list[str]]:
    """Model, image processor and class names of a folder or a Hub id."""
    model = AutoModelForSemanticSegmentation.from_pretrained(name, trust_remote_code=remote_code, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=remote_code)
    return model.eval(), processor, [model.config.id2label[index] for index in range(model.config.num_labels)]


def open_image(path: str, num_classes: int) -> Image.Image:
    """The picture in a file, upright and RGB, and small enough for so many classes.

    Raises:
        ValueError: for what is no picture, too large, too long, or would be black as 8 bits.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > PIXELS:
                raise ValueError(f"it has {width}x{height} pixels, and {PIXELS} is the limit. Make it smaller.")
            if max(width, height) > ASPECT * min(width, height):
                raise ValueError(f"it is {width}x{height}, more than {ASPECT} times as long as wide. Cut it.")
            form = str(picture.tile[0][3]) if picture.tile else ""
            if picture.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits per channel. Save it as 8-bit RGB or grey.")
            image = ImageOps.exif_transpose(picture).convert("RGB")
            if ";16" in form and np.asarray(image).max() < 64:
                raise ValueError("it has 16 bits per channel, the upper ones empty. Save it as 8-bit RGB.")
    except ValueError as error:
        raise ValueError(f"The picture cannot be taken: {error}") from error
    except (OSError, SyntaxError, EOFError, IndexError, KeyError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"The file cannot be read as a picture: {error}") from error
    factor = (SCORES / num_classes / image.width / image.height) ** 0.5
    return image if factor >= 1 else image.resize([max(int(side * factor), 1) for side in image.size])


@torch.no_grad()
def see(model: Any, processor: Any, image: Image.Image) -> dict[str, np.ndarray]:
    """`labels` (H,W) uint8 and `confidence` (H,W) float32, the probability of the class that was chosen."""
    size = (image.height, image.width)
    outputs = model(**processor(image, return_tensors="pt"))
    labels = processor.post_process_semantic_segmentation(outputs, [size])[0]
    logits = F.interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False)
    confidence = logits.softmax(1)[0].gather(0, labels[None])[0]
    return {"labels": labels.numpy().astype(np.uint8), "confidence": confidence.numpy()}


def draw(image: np.ndarray, seen: dict[str, np.ndarray], colors: np.ndarray, view: str, share: float) -> np.ndarray:
    """The image under the classes, of which `share` in [0,1] shows; or the confidence, dark is unsure."""
    if view == "confidence":
        picture = np.repeat((255 * seen["confidence"]).round().astype(np.uint8)[..., None], 3, axis=2)
    else:
        picture = (image * (1 - share) + colors[seen["labels"]] * share).round().astype(np.uint8)
    factor = max(512 // max(image.shape[:2]), 1)  # a small one would be lost on the page
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def legend(classes: Sequence[str], colors: np.ndarray) -> str:
    boxes = [
        f'<span style="display:inline-block;margin:2px 14px 2px 0"><span style="display:inline-block;width:1em;'
        f'height:1em;vertical-align:-0.15em;margin-right:6px;border:1px solid #8888;background:rgb{tuple(color)}">'
        f"</span>{html.escape(name)}</span>"
        for name, color in zip(classes, colors.tolist(), strict=True)
    ]
    return f"<div>{''.join(boxes)}</div>"


def build(settings: dict[str, Any], examples: Sequence[str], remote_code: bool) -> Any:
    """The page.

    Args:
        settings: "models" {title: folder or Hub id}, "colors" {class: [R, G, B]}.
        examples: paths of images to pick.
        remote_code: whether to run the Python files that stand beside the weights.

    Raises:
        ValueError: if the models do not name the same classes in the same order.
    """
    import gradio as gr

    loaded = {title: load(name, remote_code) for title, name in settings["models"].items()}
    names = [classes for _, _, classes in loaded.values()]
    classes = names[0]
    if any(other != classes for other in names):
        raise ValueError(f"the models know other classes: {'; '.join(', '.join(other) for other in names)}.")
    colors = np.array([settings["colors"][name] for name in classes], np.uint8)
    titles = list(loaded)

    def render(state: dict[str, Any] | None, share: float, view: str) -> list[Any]:
        if state is None:
            return [None] * len(titles)
        return [draw(state["image"], state[title], colors, view, share) for title in titles]

    def segment(path: str | None, share: float, view: str) -> list[Any]:
        try:
            if path is None:
                raise ValueError("Upload or pick an image first.")
            image = open_image(path, len(classes))
        except ValueError as error:
            gr.Warning(str(error))
            return [None, *render(None, share, view), None]
        state: dict[str, Any] = {"image": np.asarray(image)}
        state |= {title: see(model, processor, image) for title, (model, processor, _) in loaded.items()}
        shares = [
            100 * np.bincount(state[title]["labels"].ravel(), minlength=len(classes)) / image.width / image.height
            for title in titles
        ]
        sure = [float(state[title]["confidence"].mean()) for title in titles]
        table = [[name, *(f"{one[index]:.1f}" for one in shares)] for index, name in enumerate(classes)]
        table.append(["mean confidence", *(f"{100 * one:.1f}" for one in sure)])
        return [state, *render(state, share, view), table]

    with gr.Blocks(title="t2sda_hf") as page:
        gr.Markdown(f"# {html.escape(settings.get('title', 'Semantic segmentation, adapted'))}")
        state = gr.State()
        with gr.Row():
            with gr.Column(scale=1):
                image = gr.Image(
                    # As a file: whatever is in it, gradio itself does not decode it.
                    type="filepath",
                    image_mode=None,
                    label="image",
                    sources=["upload", "clipboard"],
                    height=260,
                )
                button = gr.Button("Segment", variant="primary")
                if examples:
                    gr.Examples([[path] for path in examples], inputs=[image], label="or pick one")
            with gr.Column(scale=2):
                with gr.Row():
                    outputs = [gr.Image(label=title, interactive=False, height=300) for title in titles]
                with gr.Row():
                    share = gr.Slider(0, 1, value=0.6, step=0.05, label="overlay")
                    view = gr.Radio(list(VIEWS), value=VIEWS[0], label="view (confidence: dark is unsure)")
                gr.HTML(legend(classes, colors))
        table = gr.Dataframe(headers=["class", *(f"{title}, % of pixels" for title in titles)], interactive=False)
        button.click(segment, [image, share, view], [state, *outputs, table], api_name="segment")
        for control in (share, view):
            control.change(render, [state, share, view], outputs, show_progress="hidden")
    return page


def serve(page: Any, port: int | None) -> None:
    import gradio as gr

    # Fonts of the system: the default theme fetches its own from elsewhere.
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(server_port=port, theme=plain, footer_links=[])


def examples_in(folder: Path) -> list[str]:
    """Paths of the images in a folder."""
    found = (path for path in folder.glob("*") if path.suffix.lower() in FILES and not path.name.startswith("."))
    return sorted(map(str, found))


def main(folder: Path) -> None:
    """Serve a Space."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    serve(build(settings, examples_in(folder / "examples"), remote_code=True), None)


if __name__ == "__main__":
    main(Path(__file__).parent)
