"""Dictionaries of activations: sparse autoencoders, transcoders, and anything else with an encoder and a decoder."""

from lib_lightning.dictionaries.adapted import AdaptedDictionary
from lib_lightning.dictionaries.dictionary import Dictionary
from lib_lightning.dictionaries.topk_sae import TopKSAE
from lib_lightning.dictionaries.transcoder import Transcoder

__all__ = ["AdaptedDictionary", "Dictionary", "TopKSAE", "Transcoder"]
