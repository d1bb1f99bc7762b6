/* Adam's update of some numbers, `vaelab.optim` says what the arguments are:

       m = beta1 m + rest1 g      v = beta2 v + rest2 g^2      w -= rate (of_m m + of_g g) / (sqrt(v) / root + eps)

   where g is scale times the gradient, rest = 1 - beta, root = sqrt(1 - beta2^t), and of_m, of_g hold the correction of m's
   bias, and Nesterov's look ahead. */

#ifndef ADAM_H
#define ADAM_H

#include "functions.h"
#include "tiles.h"

#define RUN 4096 /* numbers that a thread updates in one piece */

typedef struct {
    float lr, scale, beta1, rest1, beta2, rest2, of_m, of_g, root, eps;
} Adam;

/* The constants in all lanes. */
typedef struct {
    __m512 scale, beta1, rest1, beta2, rest2, of_m, of_g, unroot, eps;
} Lanes;

static inline __attribute__((always_inline)) void adam16(const Lanes *a, int nesterov, const float *g, float *w, float *m, float *v,
                                                         __mmask16 inside) {
    const __m512 most = _mm512_set1_ps(1e38f);
    __m512 gradient = _mm512_mul_ps(a->scale, _mm512_maskz_loadu_ps(inside, g));
    __m512 mean = _mm512_fmadd_ps(a->beta1, _mm512_maskz_loadu_ps(inside, m), _mm512_mul_ps(a->rest1, gradient));
    __m512 square = _mm512_mul_ps(_mm512_mul_ps(a->rest2, gradient), gradient);
    square = _mm512_fmadd_ps(a->beta2, _mm512_maskz_loadu_ps(inside, v), square);
    __m512 below = _mm512_fmadd_ps(root16(_mm512_min_ps(most, square)), a->unroot, a->eps);
    __m512 move = _mm512_mul_ps(a->of_m, mean);
    if (nesterov) move = _mm512_fmadd_ps(a->of_g, gradient, move);
    move = _mm512_mul_ps(move, reciprocal16(below));
    _mm512_mask_storeu_ps(m, inside, mean);
    _mm512_mask_storeu_ps(v, inside, square);
    _mm512_mask_storeu_ps(w, inside, _mm512_sub_ps(_mm512_maskz_loadu_ps(inside, w), move));
}

static inline __attribute__((always_inline)) void adam_all(const Lanes *a, int nesterov, const float *g, float *w, float *m,
                                                           float *v, long n) {
    long i = 0;
    for (; i + 16 <= n; i += 16) adam16(a, nesterov, g + i, w + i, m + i, v + i, 0xffff);
    if (i < n) adam16(a, nesterov, g + i, w + i, m + i, v + i, first16(n - i));
}

/* Of n numbers, one after the other; rate = multiple times lr. */
static inline void adam_run(const Adam *a, float multiple, const float *g, float *w, float *m, float *v, long n) {
    const float rate = a->lr * multiple;
    const Lanes all = {_mm512_set1_ps(a->scale), _mm512_set1_ps(a->beta1), _mm512_set1_ps(a->rest1), _mm512_set1_ps(a->beta2),
                       _mm512_set1_ps(a->rest2), _mm512_set1_ps(a->of_m * rate), _mm512_set1_ps(a->of_g * rate),
                       _mm512_set1_ps(1 / a->root), _mm512_set1_ps(a->eps)};
    if (a->of_g != 0)
        adam_all(&all, 1, g, w, m, v, n);
    else
        adam_all(&all, 0, g, w, m, v, n);
}

#endif
