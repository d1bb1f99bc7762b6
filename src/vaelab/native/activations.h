/* What follows the sums of a layer, in the same pass: forward an activation, on the way back the slope of the one before. */

#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H

#include "functions.h"
#include "tiles.h"

enum { IDENTITY, RELU, SILU };

/* `start`, one number for each output or null, is added to the sums; then comes the activation. Of SiLU the slopes are kept in
   `slopes`, of the shape of the output. */
typedef struct {
    const float *start;
    long activation;
    float *slopes;
} Forward;

/* Of an activation whose input the gradient is asked for: what it gave (RELU) or its slopes (SILU), of the gradient's shape. */
typedef struct {
    long activation;
    const float *from;
} Gate;

/* The activation of some numbers; `slopes` is where those of SiLU are kept. */
static inline __m512 activated(long activation, __m512 v, float *slopes, __mmask16 inside) {
    if (activation == RELU) return _mm512_max_ps(_mm512_setzero_ps(), v);
    if (activation != SILU) return v;
    __m512 s = sigmoid16(v), value = _mm512_mul_ps(v, s);
    _mm512_mask_storeu_ps(slopes, inside, _mm512_fnmadd_ps(value, s, _mm512_add_ps(value, s))); /* s + v s (1 - s) */
    return value;
}

/* The gradient before the activation from that after it; `from` is where the gate's numbers are. */
static inline __m512 gated(long activation, __m512 gradient, const float *from, __mmask16 inside) {
    if (activation == IDENTITY) return gradient;
    __m512 gate = _mm512_maskz_loadu_ps(inside, from);
    return activation == RELU ? _mm512_maskz_mov_ps(above0(gate), gradient) : _mm512_mul_ps(gradient, gate);
}

/* c (m, n) = or += the block of sums that begins at row i, column j, through a gate of c's shape; gives the sum of the squares of
   what c holds then. */
static inline double put(const float *sums, int add, Gate gate, long m, long n, long i, long j, float *c) {
    __m512 squares = _mm512_setzero_ps();
    for (int h = 0; h < 2; h++) {
        __mmask16 inside = first16(n - j - h * HALF);
        float *to = c + i * n + j + h * HALF;
        for (long r = 0; r < least(SIDE, m - i); r++, to += n) {
            __m512 sum = _mm512_maskz_loadu_ps(inside, sums + r * SIDE + h * HALF);
            if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, to));
            sum = gated(gate.activation, sum, gate.from + (to - c), inside);
            squares = _mm512_fmadd_ps(sum, sum, squares);
            _mm512_mask_storeu_ps(to, inside, sum);
        }
    }
    return _mm512_reduce_add_ps(squares);
}

#endif
