"""`vae`: the causal 3D convolutional autoencoder that megasora.train_codec trains.

boundary.py: what lies around a piece of a clip. layers.py: convolutions, blocks, resampling. network.py: VideoVAE.
quantizers.py: the latents of kl, vq and fsq. stream.py and tiles.py: pieces of any size. codec.py: the frozen codec.
"""
