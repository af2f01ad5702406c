"""Inference-time methods: images with a higher reward from an unchanged model.

Each method is a function of a sampling chain, the starting noise and a reward of latents; it returns the latents.
"""
