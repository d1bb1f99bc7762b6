/* Convolutions between large images x (images, c, h, w) and small ones y (images, n, p, q), with weights w (n, c, kh, kw):

       down      y[n, p, q] = sum of w[n, c, i, j] x[c, p sh - ph + i, q sw - pw + j]
       up        the same sum the other way, from y to x
       weights   dw = the sum of y x over images and positions

   A convolution is down; its gradients are up and weights. A transposed convolution is up; its gradients are down and weights.
   Float32 in and out, products of bfloat16 with float32 sums. All threads of a parallel region call these together, and none
   goes on before all are done; of scratch, `convolution_room` says how much. */

#ifndef CONVOLUTION_H
#define CONVOLUTION_H

#include "activations.h"
#include "rows.h"

typedef struct {
    long images, c, h, w, n, p, q, kh, kw, sh, sw, ph, pw;
} Shape;

/* Down or up, and what follows, through the gate: forward there is none, and on the way back nothing else. Adds the sums of the
   squares of what is read and of what is written to *read and *written, where they are not null, in any order. */
void convolution_shared(const Shape *s, int upwards, const float *from, const float *w, Forward then, Gate gate, float *to,
                        double *read, double *written, bf16 *scratch, bf16 *alone);

/* dw, or dw +=, and of each n the sum of the squares of what it holds then, where `squares` is not null. */
void convolution_weights_shared(const Shape *s, const float *x, const float *y, float *dw, int add, double *squares,
                                bf16 *scratch, bf16 *alone);

/* db (channels), or db +=, the sums of images (images, channels, size) over images and positions, and their squares. */
void convolution_bias_shared(const float *x, float *db, int add, double *squares, long images, long channels, long size);

/* Numbers of scratch, in bfloat16, that any of these needs: of all threads, and of each alone. */
void convolution_room(const Shape *s, long *rooms);

#endif
