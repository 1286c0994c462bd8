"""Unsupervised domain adaptation for semantic segmentation: T2S-DA on transformers, accelerate and datasets."""

from .config import load_config
from .models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor

__all__ = ["T2SDAConfig", "T2SDAForSemanticSegmentation", "T2SDAImageProcessor", "load_config"]
__version__ = "0.1.0"
