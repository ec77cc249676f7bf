"""Hydra configs; a package only so that `pkg://ringattn.conf` finds them."""
