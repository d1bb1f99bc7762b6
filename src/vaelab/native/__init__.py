"""vaelab's own kernels, in C: matrix products of bfloat16 numbers with float32 sums, Bernoulli pixels, Adam.

A small network's step is bound by what surrounds its products: casts, copies, dozens of operations that each read and
write everything once more. Here a linear layer reads float32 and writes float32, and is rounded to bfloat16 only on its way
into the processor's tile registers (`tiles.h`); the sums over pixels are one pass (`pixels.c`), and so is Adam (`adam.c`).

They are compiled at their first use, in 2 to 4 s, where there is a C compiler and the processor multiplies bfloat16,
and kept in the user's cache under a name that holds the checksum of the source and the processor's abilities. Where
something is missing, everything runs in torch's kernels: `library()` is None, and `reason()` says why. VAELAB_KERNELS=torch
asks for that.

    tiles.h           the product of two matrices, block by block
    rows.h            what its operands are made from
    turns.h           which thread does what
    activations.h     what follows a layer's sums in the same pass
    images.c          images of a data set, from bytes to a batch, or to what a first layer reads
    linear.c          linear layers: forward, and the gradients of weights and input
    exact.c           the same in float32, for layers that read codes or give a posterior's parameters
    convolution.c     convolutions and transposed ones, each the other's gradient, from `windows.h`: how they read images
    pixels.c          log p(x) of Bernoulli pixels, from logits, or in the product that gives them
    codes.h           codes drawn from a diagonal Gaussian, and their rate
    step.c            whole steps of the most used composition, from those parts
    decode.h          many codes through the last layers of a dense decoder
    scoring.c         what they say of one image: importance sampling
    shares.c          what they say of many images: quadrature
    adam.c            the optimiser's pass, and `adam.h` the update itself
    functions.h       exponentials, sines, reciprocals, roots
    build.py          compiling, keeping, loading
    calls.py          what their calls share: scratch, and where gradients go
    convolutions.py   convolutions as autograd sees them
    layers.py         linear layers, and the modules of a model that compute with them
    decoder.py        which decoders `decode.h` knows, and their packed weights
    scoring.py        log p(x|z) of many codes in one pass
    shares.py         the inner loop of quadrature
    chain.py          which modules are which operations
    step.py           which models are that composition, and its steps
    pace.py           how many threads, and how many steps at once
"""

from vaelab.native.build import ahead, library, reason, version

__all__ = ["ahead", "library", "reason", "version"]
