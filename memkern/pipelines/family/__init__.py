"""Knowledge of diffusers' and transformers' classes."""
