/* Bernoulli pixels: the sums over an image, and the gradient with respect to the logits where it is asked for.

       log p(x) = sum x l - log(1 + e^l),  log(1 + e^l) = max(l, 0) + log(1 + e^-|l|),  d/dl = x - 1 / (1 + e^-l)

   Each factor 1 + e^-|l| lies in [1, 2], so that of up to 64 of them one logarithm is taken. */

#ifndef PIXELS_H
#define PIXELS_H

#include <math.h>

#include "functions.h"
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

#endif
