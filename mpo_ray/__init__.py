"""mpo_ray: align one language model to several human preferences at once.

Importing the package registers the mixture (`model_type: "mpo_mixture"`) with transformers, where transformers is
installed, so that `AutoModelForCausalLM.from_pretrained` opens a mixture artefact.
"""

from importlib.util import find_spec

if find_spec("transformers") is not None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from mpo_ray.policies.mixture import MixtureForCausalLM
    from mpo_ray.policies.mixture_config import MixtureConfig

    AutoConfig.register(MixtureConfig.model_type, MixtureConfig)
    AutoModelForCausalLM.register(MixtureConfig, MixtureForCausalLM)
