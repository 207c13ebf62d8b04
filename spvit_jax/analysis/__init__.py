"""What a model's heads do, as numbers: measures of attention and of learned priors.

`attention` is each layer's attention with the place of every patch in the image, `measures` has
the numbers of each head over any number of images, `similarity` compares layers, `priors` learned
gains, and `masks` chooses MaiT's masked heads. Nothing here draws: that is `drawing`.
"""
