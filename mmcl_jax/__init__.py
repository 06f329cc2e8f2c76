"""ECG encoders pre-trained with cardiac MRI: masked reconstruction and dual-phase contrastive
learning in JAX."""

__version__ = "0.1.0"
