"""Optimized Fine-Tuning (OFT) of vision-language-action models. Import the submodules; this package imports nothing."""

__version__ = "0.1.0"
