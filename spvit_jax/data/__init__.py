"""Input on the host: data sets, crops and augmentation of their images, and batches of them.

Only this package imports TensorFlow. Augmentation of batches on the device is in `augment/`.
"""
