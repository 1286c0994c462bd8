"""The metric's page, as `evaluate` makes it."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).parent), num_labels=19))
