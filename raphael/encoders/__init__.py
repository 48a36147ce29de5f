"""What is pretrained elsewhere or in a stage of its own: autoencoders, text, image and edge models."""
