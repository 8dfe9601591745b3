"""Sparse autoencoders for language-model activations: a course, and the small package under it."""

import importlib.util
import os

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError("tutorial_sae needs PyTorch, which is not installed: pip install -r requirements.txt")

# Threads that spin while they wait slow each other down on a small machine. Read when PyTorch loads, so set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tutorial_sae.activations import ActivationStore
from tutorial_sae.metrics import evaluate
from tutorial_sae.models import load_model
from tutorial_sae.pretrained import heldout_slice, load_pretrained
from tutorial_sae.runtime import TutorialError, set_threads
from tutorial_sae.saes import BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE, VanillaSAE, load_sae
from tutorial_sae.text import load_text
from tutorial_sae.threshold import calibrate_threshold
from tutorial_sae.training import TrainConfig, train

__version__ = "0.1.0"

__all__ = [
    "ActivationStore",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "TopKSAE",
    "TrainConfig",
    "TutorialError",
    "VanillaSAE",
    "calibrate_threshold",
    "evaluate",
    "heldout_slice",
    "load_model",
    "load_pretrained",
    "load_sae",
    "load_text",
    "set_threads",
    "train",
]
