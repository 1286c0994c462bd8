"""The metric's page. (evaluate's own widget, launch_gradio_widget, needs a gradio of before version 4.)"""

import json
from pathlib import Path

import evaluate
import gradio as gr

HERE = Path(__file__).parent
CARD = (HERE / "README.md").read_text(encoding="utf-8").split("---", 2)[2]


def compute(predictions: str, references: str, num_labels: float) -> tuple[dict[str, float], list[list[str]]]:
    """Scores of one pair of label maps, written as lists of rows of class ids."""
    try:
        metric = evaluate.load(str(HERE / "streaming_mean_iou.py"), num_labels=int(num_labels))
        metric.add(predictions=json.loads(predictions), references=json.loads(references))
        found = metric.compute()
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error)) from error
    scores = {name: float(found[name]) for name in ("mean_iou", "mean_accuracy", "overall_accuracy")}
    pairs = zip(found["per_category_iou"], found["per_category_accuracy"], strict=True)
    return scores, [[str(index), f"{iou:.4f}", f"{accuracy:.4f}"] for index, (iou, accuracy) in enumerate(pairs)]


with gr.Blocks(title="Streaming mean IoU") as page:
    with gr.Row():
        predictions = gr.Textbox("[[0, 1], [2, 2]]", label="predictions, rows of ids", lines=4)
        references = gr.Textbox("[[0, 1], [1, 255]]", label="references, 255 is not counted", lines=4)
        num_labels = gr.Number(3, label="classes", precision=0, minimum=1)
    button = gr.Button("Compute", variant="primary")
    with gr.Row():
        scores = gr.JSON(label="scores")
        table = gr.Dataframe(headers=["class", "IoU", "accuracy"], label="per class", interactive=False)
    button.click(compute, [predictions, references, num_labels], [scores, table])
    gr.Markdown(CARD)

if __name__ == "__main__":
    page.launch(theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]))
