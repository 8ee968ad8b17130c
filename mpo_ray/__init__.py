"""mpo_ray: align one language model to several human preferences at once.

Importing the package registers the mixture (`model_type: "mpo_mixture"`) with transformers, so that
`AutoModelForCausalLM.from_pretrained` opens a mixture artefact. The import itself loads neither torch nor transformers:
the mixture's config comes with transformers' AutoConfig, and the mixture when one is opened.
"""

import importlib
from types import ModuleType

from wrapt import register_post_import_hook


def _register(_: ModuleType) -> None:
    importlib.import_module("mpo_ray.policies.mixture_config")


register_post_import_hook(_register, "transformers.models.auto.configuration_auto")
