"""Try a model in the browser: python scripts/demo.py ADAPTED_MODEL --compare SOURCE_ONLY_MODEL

Upload an image or pick one; see what the models see, how sure they are, and how large every class is. Works offline.
--space DIR writes a Space of the Hub instead, of which this same file is the app: settings.json beside it names the
models, which then come with their own code. Needs gradio (pip install "t2sda_hf[demo]").
"""

import argparse
import html
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

HERE = Path(__file__).parent
REQUIREMENTS = ("torch", "transformers>=5.23,<6", "numpy", "pillow")
VIEWS = ("classes", "confidence")
FILES = (".png", ".jpg", ".jpeg", ".webp")


def load(name: str, remote_code: bool) -> tuple[Any, Any, list[str]]:
    """Model, image processor and class names of a folder or a Hub id."""
    model = AutoModelForSemanticSegmentation.from_pretrained(name, trust_remote_code=remote_code, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=remote_code)
    return model.eval(), processor, [model.config.id2label[index] for index in range(model.config.num_labels)]


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
    factor = max(512 // image.shape[1], 1)  # a small one would be lost on the page
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

    def segment(image: Image.Image | None, share: float, view: str) -> list[Any]:
        if image is None:
            gr.Warning("Upload or pick an image first.")
            return [None, *render(None, share, view), None]
        image = ImageOps.exif_transpose(image).convert("RGB")
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
                image = gr.Image(type="pil", label="image", sources=["upload", "clipboard"], height=260)
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


def write_space(folder: Path, settings: dict[str, Any], examples: Sequence[str], gradio_version: str) -> None:
    """Everything that a Space needs; push it with `hf upload USER/NAME FOLDER --repo-type space`."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty: choose another --space.")
    local = [name for name in settings["models"].values() if Path(name).exists() or name.count("/") != 1]
    if local:
        raise ValueError(f"a Space loads its models from the Hub: push {', '.join(local)} and give user/name instead.")
    (folder / "examples").mkdir(parents=True)
    shutil.copy(__file__, folder / "app.py")
    for path in examples:
        shutil.copy(path, folder / "examples" / Path(path).name)
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    models = "".join(f"\n- {name}" for name in settings["models"].values())
    (folder / "README.md").write_text(
        f"---\ntitle: {json.dumps(settings['title'])}\nemoji: 🛣️\ncolorFrom: blue\ncolorTo: green\nsdk: gradio\n"
        f"sdk_version: {gradio_version}\napp_file: app.py\nlicense: apache-2.0\nmodels:{models}\n---\n\n"
        "Semantic segmentation before and after adaptation to images without labels, made by t2sda_hf.\n",
        encoding="utf-8",
    )


def serve(page: Any, port: int | None) -> None:
    import gradio as gr

    # Fonts of the system: the default theme fetches its own from elsewhere.
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(server_port=port, theme=plain, footer_links=[])


def space_main() -> int:
    settings = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
    examples = sorted(str(path) for path in (HERE / "examples").glob("*") if path.suffix.lower() in FILES)
    serve(build(settings, examples, remote_code=True), None)
    return 0


def drawn_examples(folder: Path) -> list[str]:
    """Three images of the drawn target domain."""
    from t2sda_hf.config import DomainConfig
    from t2sda_hf.data.domains import load_domain

    domain = load_domain(DomainConfig(path="streets-target", split="validation", num_images=3), labelled=False)
    paths = [folder / f"street_{index}.png" for index in range(len(domain))]
    for index, path in enumerate(paths):
        Image.fromarray(domain.image(index)).save(path)
    return [str(path) for path in paths]


def run(args: argparse.Namespace) -> None:
    from tempfile import TemporaryDirectory

    from t2sda_hf.evaluation.inference import load_model
    from t2sda_hf.labels import palette

    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("the demo needs gradio: pip install 't2sda_hf[demo]'.") from error
    models = {} if args.compare is None else {"source only": args.compare}
    models["adapted" if models else "model"] = args.model
    known = [load_model(name)[1] for name in models.values()]  # whatever is wrong with one is said in a sentence
    if any(classes != known[0] for classes in known):
        raise ValueError(f"{args.model} knows {', '.join(known[-1])}; {args.compare} knows {', '.join(known[0])}.")
    colors = dict(zip(known[0], palette(known[0]).tolist(), strict=True))
    settings = {"title": args.title, "models": models, "colors": colors}
    with TemporaryDirectory() as temporary:
        folder = args.examples
        if folder is not None:
            examples = sorted(str(path) for path in folder.glob("*") if path.suffix.lower() in FILES)
        else:
            examples = drawn_examples(Path(temporary))
        if args.space is not None:
            write_space(args.space, settings, examples, gr.__version__)
            print(f"Written: {args.space}. Push it with: hf upload USER/NAME {args.space} --repo-type space")
        else:
            serve(build(settings, examples, remote_code=False), args.port)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--compare", metavar="SOURCE_ONLY_MODEL", help="shown beside it")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="images to pick; default: drawn streets")
    parser.add_argument("--title", default="Street scenes, adapted without labels")
    parser.add_argument("--port", type=int)
    parser.add_argument("--space", type=Path, metavar="DIR", help="write a Space here instead")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None and (HERE / "settings.json").is_file():
        return space_main()
    try:
        run(parse_arguments(arguments))
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if not (HERE / "settings.json").is_file():  # in a Space there is this file alone
        from t2sda_hf.masking import run_masked

        sys.exit(run_masked(main))
    sys.exit(main())
