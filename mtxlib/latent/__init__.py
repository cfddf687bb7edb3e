"""What a trained latent can do, and the numbers that show it. Nothing here trains the model."""
