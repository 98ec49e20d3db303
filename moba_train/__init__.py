"""moba_train: long-context continued pretraining with MoBA (Mixture of Block Attention)."""

__version__ = "0.1.0"
