"""Augmentation on the device, inside the train step: pixels, RandAugment, mixing, label maps.

What is done to single images on the host is in `data/crops.py`. Nothing here imports TensorFlow.
"""
