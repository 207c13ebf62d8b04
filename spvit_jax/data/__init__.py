"""Input on the host: data sets, crops and augmentation of their images, and batches of them.

Only this package imports TensorFlow, and `export/saved_model.py`, which writes its format.
Augmentation of batches on the device is in `augment/`.
"""
