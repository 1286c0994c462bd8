"""Unsupervised domain adaptation for semantic segmentation: T2S-DA on transformers, accelerate and datasets.

Nothing heavy is imported here, so that the command line answers at once. The model classes are registered with
transformers' Auto classes as soon as both packages are imported, whichever comes first.
"""

import sys
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import load_config
    from .models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor

__all__ = ["T2SDAConfig", "T2SDAForSemanticSegmentation", "T2SDAImageProcessor", "load_config"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".config" if name == "load_config" else ".models", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _WithTransformers(MetaPathFinder):
    """Imports `t2sda_hf.models`, which registers itself, right after transformers' own __init__ has run."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                import_module(".models", __name__)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    import_module(".models", __name__)
else:
    sys.meta_path.insert(0, _WithTransformers())
