"""The Hugging Face model code. `save_pretrained` copies these files next to the weights, so that a checkpoint loads
without this package: they import torch, transformers, numpy, PIL and each other, nothing else of ours."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation

from .configuration_t2sda import MIT_SIZES, RESNET_SIZES, T2SDAConfig
from .image_processing_t2sda import T2SDAImageProcessor
from .modeling_t2sda import T2SDAForSemanticSegmentation, T2SDAOutput
from .pretrained import encoder_fields, load_pretrained_encoder

AutoConfig.register(T2SDAConfig.model_type, T2SDAConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(T2SDAConfig, T2SDAForSemanticSegmentation, exist_ok=True)
# One class for both: it does not depend on torchvision, so users with and without it get the same pixels.
AutoImageProcessor.register(
    T2SDAConfig,
    image_processor_classes={"pil": T2SDAImageProcessor, "torchvision": T2SDAImageProcessor},
    exist_ok=True,
)

__all__ = [
    "MIT_SIZES",
    "RESNET_SIZES",
    "T2SDAConfig",
    "T2SDAForSemanticSegmentation",
    "T2SDAImageProcessor",
    "T2SDAOutput",
    "encoder_fields",
    "load_pretrained_encoder",
]
