"""`serve run serve_apps/mixture.yaml`: a mixture artefact behind an OpenAI-compatible endpoint."""

from mpo_ray.serving.service import build

__all__ = ["build"]
