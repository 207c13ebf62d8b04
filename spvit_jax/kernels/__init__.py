"""Kernels that compute what `models/` computes readably, faster, and nothing else.

`fused` is all of softmax(G ⊙ QKᵀ/√d + B) V in one Pallas program for TPUs, for any G and B, and
`fused_gpu` the same for GPUs; `position_conv` is SP-ViT's position convolution as another, for
TPUs. `local` is MaiT's masked heads at a cost linear in the number of tokens, on any device, and
`fused_local` the same for TPUs.
"""

# `checkpoint_name` that each kernel of attention gives its result, by which loops keep it.
CONTEXT = "attention_context"
