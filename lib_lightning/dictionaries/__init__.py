"""Dictionaries of activations: objects with an encoder and a decoder, such as sparse autoencoders."""

from lib_lightning.dictionaries.topk_sae import TopKSAE

__all__ = ["TopKSAE"]
