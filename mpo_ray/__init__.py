"""mpo_ray: align one language model to several human preferences at once.

Importing the package registers the mixture (`model_type: "mpo_mixture"`) with transformers, where transformers is
installed, so that `AutoModelForCausalLM.from_pretrained` opens a mixture artefact.
"""
