"""Augmentation on the device, inside the train step: pixels, RandAugment, mixing, label maps.

Crops of single images, on the host, are in `data/crops.py`. Nothing here imports TensorFlow.
"""
