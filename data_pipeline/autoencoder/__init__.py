"""Stage `autoencoder`: the KL autoencoder, trained here or loaded."""
