"""Vision transformers with spatial priors (SP-ViT, MaiT) and their baselines, in JAX."""

__version__ = "0.1.0"
