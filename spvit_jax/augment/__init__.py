"""Augmentation on the device, inside the train step: normalising, erasing, mixing, label maps.

What is done to single images, RandAugment included, is in `data/`, on the host. Nothing here
imports TensorFlow, and nothing gathers or scatters, which are loops over elements on a TPU.
"""
