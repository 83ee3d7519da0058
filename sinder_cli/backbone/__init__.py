"""What a Vision Transformer is to us: its layer map, its weights, its plugin."""
