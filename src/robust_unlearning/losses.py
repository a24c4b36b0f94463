"""The losses, tensors in and a scalar out, under the name that other people's trainers import: see `methods.losses`."""

from robust_unlearning.methods.losses import dpo, hidden_mse, logit_kl, logit_mse, npo, simnpo

__all__ = ["dpo", "hidden_mse", "logit_kl", "logit_mse", "npo", "simnpo"]
