/* Many codes through the last layers of a dense decoder, near the processor. The rows of a block of sums are a layer's outputs and
   its columns codes, so two rows are a row of pairs of the next layer's B, and at the end each lane adds up a code of its own.

   Weights and what lies between layers have one part, which makes it a product of bfloat16 numbers, two or three (see `tiles.h`). */

#ifndef DECODE_H
#define DECODE_H

#include "functions.h"
#include "rows.h"

/* `layers` linear layers of widths[0] inputs and widths[l + 1] outputs, from `pack_rows` one after the other, their biases filled up
   to multiples of 32; kinds[l]: the activation after each but the last. */
typedef struct {
    const bf16 *weights;
    const float *biases;
    const long *widths;
    const int *kinds;
    long layers;
} Decoder;

enum { RELU, SILU, NONE };

static inline __m512 activated(__m512 l, int kind) {
    const __m512 zero = _mm512_setzero_ps();
    if (kind == NONE) return l;
    if (kind == RELU) return _mm512_max_ps(zero, l); /* l where it is not a number */
    __m512 most = _mm512_set1_ps(80); /* l / (1 + e^-l), beyond it 0, where the reciprocal is that of a finite number */
    __m512 below = _mm512_add_ps(_mm512_set1_ps(1), exp16(_mm512_min_ps(_mm512_sub_ps(zero, l), most)));
    __m512 inverse = _mm512_rcp14_ps(below);
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(2)));
    return _mm512_mul_ps(l, inverse);
}

/* 32 rows of sums, of outputs from j on for 32 codes, as rows of the next layer's B of depth `depth`; `part` numbers to each further
   part. */
static inline __attribute__((always_inline)) void as_inputs(const float *sums, const float *bias, int kind, int parts, long part,
                                                             long depth, long j, bf16 *out) {
    for (int h = 0; h < 2; h++)
        for (int p = 0; p < SIDE; p += 2) {
            const float *row = sums + p * SIDE + h * HALF;
            __m512 a = activated(_mm512_add_ps(_mm512_load_ps(row), _mm512_set1_ps(bias[p])), kind);
            __m512 b = activated(_mm512_add_ps(_mm512_load_ps(row + SIDE), _mm512_set1_ps(bias[p + 1])), kind);
            for (int q = 0; q < parts; q++) {
                _mm512_storeu_si512(out + q * part + h * HALF * depth + (j + p) * HALF, pairs(a, b));
                if (q + 1 < parts) a = rest(a), b = rest(b);
            }
        }
}

/* The sums of 32 outputs from j on of the first layer that is left, and of 32 codes of the `codes`, from code t on. */
static inline __attribute__((always_inline)) void outputs(const Decoder *d, int parts, long codes, const bf16 *in, long j, long t,
                                                           float *sums) {
    long depth = up(d->widths[0]), n = up(d->widths[1]);
    Rows rows = {d->weights + j * depth, depth, parts > 1 ? n * depth : 0};
    block(rows, (Panels){in + t * depth, HALF * depth, codes * depth, parts}, depth, parts, sums, SIDE);
}

/* So many codes, a multiple of 32, through all layers but the last, which alone is left in *d: what the first reads, as panels of B,
   to what the last reads. `in` and `out` have room for the widest of the two. */
static inline __attribute__((always_inline)) bf16 *through(Decoder *d, int parts, long codes, bf16 *in, bf16 *out, float *sums) {
    for (; d->layers > 1; d->layers--, d->widths++, d->kinds++) {
        long depth = up(d->widths[0]), n = up(d->widths[1]);
        for (long j = 0; j < n; j += SIDE)
            for (long t = 0; t < codes; t += SIDE) {
                outputs(d, parts, codes, in, j, t, sums);
                if (d->kinds[0] == RELU) as_inputs(sums, d->biases + j, RELU, parts, codes * n, n, j, out + t * n);
                else as_inputs(sums, d->biases + j, SILU, parts, codes * n, n, j, out + t * n);
            }
        d->weights += parts * n * depth;
        d->biases += n;
        bf16 *free = in;
        in = out;
        out = free;
    }
    return in;
}

/* log p(x) of 16 codes while it is added up:

       log p(x) = sum x l - max(l, 0)  -  log of the product of 1 + e^-|l|

   The product is kept as m 2^e, 1 <= m < 2, and one logarithm is taken of it at the end. */
typedef struct {
    __m512 linear, product, doublings;
} Codes;

static inline Codes no_pixels(void) { return (Codes){_mm512_setzero_ps(), _mm512_set1_ps(1), _mm512_setzero_ps()}; }

/* Adds `pixels` rows of a block of sums, from the column of the first of 16 codes; of black ones where x is null. */
static inline void add_block(Codes *s, const float *sums, const float *bias, const float *x, long pixels) {
    const __m512 zero = _mm512_setzero_ps();
    __m512 linear = zero, product = s->product;
    for (long p = 0; p < pixels; p++) {
        __m512 l = _mm512_add_ps(_mm512_load_ps(sums + p * SIDE), _mm512_set1_ps(bias[p]));
        __m512 e = exp16(_mm512_sub_ps(zero, _mm512_abs_ps(l)));
        product = _mm512_fmadd_ps(product, e, product);
        linear = _mm512_add_ps(linear, _mm512_fmsub_ps(_mm512_set1_ps(x ? x[p] : 0), l, _mm512_max_ps(l, zero)));
    }
    s->linear = _mm512_add_ps(s->linear, linear); /* block by block: one long sum would round 30 times as much away */
    s->doublings = _mm512_add_ps(s->doublings, _mm512_getexp_ps(product));
    s->product = _mm512_getmant_ps(product, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}

/* log p(x) of `codes` of them, up to 16. */
static inline void log_px(const Codes *s, long codes, float *out) {
    float linear[HALF], product[HALF], doublings[HALF];
    _mm512_storeu_ps(linear, s->linear);
    _mm512_storeu_ps(product, s->product);
    _mm512_storeu_ps(doublings, s->doublings);
    for (long c = 0; c < least(HALF, codes); c++) out[c] = (float)(linear[c] - (M_LN2 * doublings[c] + log(product[c])));
}

#endif
