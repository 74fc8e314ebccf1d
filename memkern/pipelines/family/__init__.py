"""What is known of diffusers' and transformers' classes."""
