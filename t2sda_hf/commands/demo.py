"""Try models in the browser: what they predict, how sure they are, and how large each class is. It works offline.

    t2sda demo outputs/demo --compare outputs/demo/source_only/student
    t2sda demo USER/streets-t2sda --examples photos
    t2sda demo USER/streets-t2sda --compare USER/source-only --space space     # then: hf upload USER/NAME space ...

With --space DIR the command writes a Space of the Hub instead of opening the page. The models of a Space must be on the
Hub, and the Space runs the code that comes with them. The command needs gradio (pip install "t2sda_hf[demo]").
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from ..config import DomainConfig
from ..data.domains import load_domain
from ..evaluation.inference import load_model
from ..evaluation.models import called, model_of
from ..hub import space_app
from ..labels import palette

REQUIREMENTS = ("torch", "transformers>=5.23,<6", "numpy", "pillow")


def run(args: Namespace) -> int:
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("the demo needs gradio: pip install 't2sda_hf[demo]'.") from error
    args.model, args.compare = model_of(args.model), args.compare and model_of(args.compare)
    models = {} if args.compare is None else {"source only": args.compare}
    models["adapted" if models else "model"] = args.model
    known = [load_model(name)[1] for name in models.values()]  # whatever is wrong with one is said in a sentence
    if any(classes != known[0] for classes in known):
        raise ValueError(f"{args.model} knows {', '.join(known[-1])}; {args.compare} knows {', '.join(known[0])}.")
    colors = dict(zip(known[0], palette(known[0]).tolist(), strict=True))
    settings = {"title": args.title or called(args.model), "models": models, "colors": colors}
    with TemporaryDirectory() as temporary:
        examples = space_app.examples_in(args.examples) if args.examples else drawn_examples(Path(temporary))
        if not examples:
            raise ValueError(f"{args.examples} holds no images of {', '.join(space_app.FILES)}: give other --examples.")
        if args.space is not None:
            write_space(args.space, settings, examples, gr.__version__)
            print(f"Written: {args.space}. Push it with: hf upload USER/NAME {args.space} --repo-type space")
        else:
            space_app.serve(space_app.build(settings, examples, remote_code=False), args.port)
    return 0


def drawn_examples(folder: Path) -> list[str]:
    """Three images of the drawn target domain."""
    domain = load_domain(DomainConfig(path="streets-target", split="validation", num_images=3), labelled=False)
    paths = [folder / f"street_{index}.png" for index in range(len(domain))]
    for index, path in enumerate(paths):
        Image.fromarray(domain.image(index)).save(path)
    return [str(path) for path in paths]


def write_space(folder: Path, settings: dict[str, Any], examples: Sequence[str], gradio_version: str) -> None:
    """Everything that a Space needs; push it with `hf upload USER/NAME FOLDER --repo-type space`."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty: choose another --space.")
    local = [name for name in settings["models"].values() if Path(name).exists() or name.count("/") != 1]
    if local:
        raise ValueError(f"a Space loads its models from the Hub: push {', '.join(local)} and give user/name instead.")
    (folder / "examples").mkdir(parents=True)
    shutil.copy(space_app.__file__, folder / "app.py")
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
