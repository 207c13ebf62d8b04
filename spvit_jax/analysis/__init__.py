"""What a model's heads do, as numbers: measures of attention and of learned priors.

`attention` is each layer's attention with the place of every patch in the image; `measures` has the
numbers of each head over any number of images, with `similarity` of layers; `image_maps` has
attention on single images, `priors` learned gains; `masks` chooses MaiT's masked heads;
`selection` checks what is asked for, and `explanation` holds all of it. Nothing here draws: that is
`drawing`.
"""
