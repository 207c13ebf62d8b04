"""Input on the host: what data sets exist, crops of their images, and batches of these.

Only this package imports TensorFlow. What is done to batches on the device is in `augment/`.
"""
