/* Bernoulli pixels: the sums over an image, and the gradient with respect to the logits where it is asked for.

       log p(x) = sum x l - log(1 + e^l),  log(1 + e^l) = max(l, 0) + log(1 + e^-|l|),  d/dl = x - 1 / (1 + e^-l)

   Each factor 1 + e^-|l| lies in [1, 2], so that of up to 64 of them one logarithm is taken. */

#ifndef PIXELS_H
#define PIXELS_H

#include <math.h>

#include "functions.h"
#include "images.h"
#include "tiles.h"

typedef struct {
    __m512 linear, product;
    double logs;
    int count;
} Score;

static inline Score score_begin(void) {
    return (Score){.linear = _mm512_setzero_ps(), .product = _mm512_set1_ps(1.0f)};
}

static inline void score_flush(Score *s) {
    float p[16];
    _mm512_storeu_ps(p, s->product);
    for (int i = 0; i < 16; i++) s->logs += logf(p[i]);
    s->product = _mm512_set1_ps(1.0f);
    s->count = 0;
}

/* Adds 16 pixels, those of the mask; returns x minus the mean. */
static inline __m512 score_add(Score *s, __m512 l, __m512 x, __mmask16 inside) {
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    __m512 e = exp16(_mm512_sub_ps(zero, _mm512_abs_ps(l)));
    __m512 factor = _mm512_add_ps(one, e);
    s->linear = _mm512_mask_add_ps(s->linear, inside, s->linear, _mm512_fmsub_ps(x, l, _mm512_max_ps(l, zero)));
    s->product = _mm512_mask_mul_ps(s->product, inside, s->product, factor);
    if (++s->count == 64) score_flush(s);
    __mmask16 below = _mm512_cmp_ps_mask(l, zero, _CMP_LT_OQ);
    return _mm512_sub_ps(x, _mm512_mul_ps(_mm512_mask_mov_ps(one, below, e), reciprocal16(factor)));
}

static inline float score_end(Score *s) {
    score_flush(s);
    return (float)((double)_mm512_reduce_add_ps(s->linear) - s->logs);
}

/* logits (rows, pixels), x (images, pixels), log_p (rows); row r is about image r % images. residual is scale (x - mean), of
   the shape of the logits, and may be their own memory, or null; the sum of its squares is added to *size, if there is one, in
   any order. All threads of a parallel region call it together. */
void bernoulli_shared(const float *logits, const float *x, float *log_p, float *residual, float scale, double *size, long rows,
                      long images, long pixels);

/* The same in the pass of the product that gives the logits, where neither they nor their gradient are ever written. n pixels of
   m rows, each of an image.
   levels    (n, width): the bytes of which x is a 255th
   plus      (n) or null: added to the logits
   linear, product   (strips of 32 pixels, up(m)): of each row and strip the sum of x l - max(l, 0), and the product of the factors
   rows      scale (x - mean) as rows of A (up(m), up(n)), and `across` its columns (up(n), up(m))
   sums      (up(n)): of its columns */
typedef struct {
    const uint8_t *levels;
    long width;
    const float *plus;
    float scale, *linear, *product;
    bf16 *rows, *across;
    float *sums;
} Pixels;

/* The score of a block of sums (pixels by rows) from pixel t and row i on; `added` are 32 numbers, for each pixel what is added to
   its logits. Adds to `sums`, 32 times 16, and returns the sum of squares, of scale (x - mean). */
static inline double score_block(const float *block, const float *added, const Pixels *p, long m, long n, long i, long t,
                                 __m512 *sums) {
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps(), scale = _mm512_set1_ps(p->scale);
    const __mmask16 rows[2] = {first16(m - i), first16(m - i - HALF)};
    const uint8_t *levels = p->levels + t * p->width + i;
    __m512 linear[2] = {zero, zero}, product[2] = {one, one}, squares[2] = {zero, zero};
    __m512i to_turn[2][16];
    for (int h = 0; h < 2; h++)
        for (int q = 0; q < 16; q++) to_turn[h][q] = _mm512_setzero_si512();
    for (long q = 0; q < least(SIDE, n - t); q += 2) {
        __m512 rest[2][2];
#pragma GCC unroll 2
        for (int b = 0; b < 2; b++, levels += p->width, block += SIDE, added++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                __mmask16 inside = t + q + b < n ? rows[h] : 0;
                __m512 l = _mm512_add_ps(_mm512_load_ps(block + h * HALF), _mm512_set1_ps(*added));
                __m512 x = level16(_mm_loadu_si128((const __m128i *)(levels + h * HALF)));
                __m512 e = exp16(_mm512_sub_ps(zero, _mm512_abs_ps(l))), factor = _mm512_add_ps(one, e);
                linear[h] = _mm512_mask_add_ps(linear[h], inside, linear[h], _mm512_fmsub_ps(x, l, _mm512_max_ps(l, zero)));
                product[h] = _mm512_mask_mul_ps(product[h], inside, product[h], factor);
                __mmask16 below = _mm512_cmp_ps_mask(l, zero, _CMP_LT_OQ);
                __m512 mean = _mm512_mul_ps(_mm512_mask_mov_ps(one, below, e), reciprocal16(factor));
                rest[b][h] = _mm512_maskz_mul_ps(inside, scale, _mm512_sub_ps(x, mean));
                squares[h] = _mm512_fmadd_ps(rest[b][h], rest[b][h], squares[h]);
            }
        for (int b = 0; b < 2; b++) {
            sums[q + b] = _mm512_add_ps(sums[q + b], _mm512_add_ps(rest[b][0], rest[b][1]));
            _mm512_storeu_si512(p->across + (t + q + b) * up(m) + i, narrow(rest[b][0], rest[b][1]));
        }
        for (int h = 0; h < 2; h++) to_turn[h][q / 2] = pairs(rest[0][h], rest[1][h]);
    }
#pragma GCC unroll 2
    for (long h = 0; h < 2; h++) {
        transpose(to_turn[h]);
        for (long r = 0; r < 16; r++) _mm512_storeu_si512(p->rows + (i + h * HALF + r) * up(n) + t, to_turn[h][r]);
        _mm512_storeu_ps(p->linear + t / SIDE * up(m) + i + h * HALF, linear[h]);
        _mm512_storeu_ps(p->product + t / SIDE * up(m) + i + h * HALF, product[h]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
}

/* log_p (m) from what `score_block` left, by all threads, which do not wait for each other. */
void scores_shared(const Pixels *p, float *log_p, long m, long n);

#endif
