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

/* `rows` rows of two registers each, those of the masks; see below. Sums of squares of each register by itself: no addition waits for
   the one before. */
static inline __attribute__((always_inline)) double put_rows(const float *sums, int add, Gate gate, long rows, __mmask16 left,
                                                             __mmask16 right, long n, float *to) {
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            __mmask16 inside = h ? right : left;
            long at = r * n + h * HALF;
            __m512 sum = _mm512_maskz_loadu_ps(inside, sums + r * SIDE + h * HALF);
            if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, to + at));
            sum = gated(gate.activation, sum, gate.from + at, inside);
            squares[h] = _mm512_fmadd_ps(sum, sum, squares[h]);
            _mm512_mask_storeu_ps(to + at, inside, sum);
        }
    return _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
}

/* c (m, n) = or += the block of sums that begins at row i, column j, through a gate of c's shape; gives the sum of the squares of
   what c holds then. */
static inline double put(const float *sums, int add, Gate gate, long m, long n, long i, long j, float *c) {
    long at = i * n + j, rows = least(SIDE, m - i);
    if (!add && gate.activation == IDENTITY && j + SIDE <= n) /* as most are */
        return put_rows(sums, 0, (Gate){IDENTITY, 0}, rows, 0xffff, 0xffff, n, c + at);
    return put_rows(sums, add, (Gate){gate.activation, gate.from + at}, rows, first16(n - j), first16(n - j - HALF), n, c + at);
}

#endif
