/* Adam's update of some numbers, `vaelab.optim` says what the arguments are:

       m = beta1 m + rest1 g      v = beta2 v + rest2 g^2      w -= rate (of_m m + of_g g) / (sqrt(v) / root + eps)

   where g is scale times the gradient, rest = 1 - beta, root = sqrt(1 - beta2^t), and of_m, of_g hold the correction of m's
   bias, and Nesterov's look ahead. */

#ifndef ADAM_H
#define ADAM_H

#include "functions.h"
#include "tiles.h"

typedef struct {
    float lr, scale, beta1, rest1, beta2, rest2, of_m, of_g, root, eps;
} Adam;

/* Of n numbers, one after the other; rate = multiple times lr. */
static inline void adam_run(const Adam *a, float multiple, const float *g, float *w, float *m, float *v, long n) {
    const __m512 scale = _mm512_set1_ps(a->scale), beta1 = _mm512_set1_ps(a->beta1), rest1 = _mm512_set1_ps(a->rest1);
    const __m512 beta2 = _mm512_set1_ps(a->beta2), rest2 = _mm512_set1_ps(a->rest2), eps = _mm512_set1_ps(a->eps);
    const float rate = a->lr * multiple;
    const __m512 of_m = _mm512_set1_ps(a->of_m * rate), of_g = _mm512_set1_ps(a->of_g * rate);
    const __m512 unroot = _mm512_set1_ps(1 / a->root), most = _mm512_set1_ps(1e38f);
    for (long i = 0; i < n; i += 16) {
        __mmask16 inside = first16(n - i);
        __m512 gradient = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(inside, g + i));
        __m512 mean = _mm512_fmadd_ps(beta1, _mm512_maskz_loadu_ps(inside, m + i), _mm512_mul_ps(rest1, gradient));
        __m512 square = _mm512_mul_ps(_mm512_mul_ps(rest2, gradient), gradient);
        square = _mm512_fmadd_ps(beta2, _mm512_maskz_loadu_ps(inside, v + i), square);
        __m512 below = _mm512_fmadd_ps(root16(_mm512_min_ps(most, square)), unroot, eps);
        __m512 move = _mm512_mul_ps(_mm512_fmadd_ps(of_m, mean, _mm512_mul_ps(of_g, gradient)), reciprocal16(below));
        _mm512_mask_storeu_ps(m + i, inside, mean);
        _mm512_mask_storeu_ps(v + i, inside, square);
        _mm512_mask_storeu_ps(w + i, inside, _mm512_sub_ps(_mm512_maskz_loadu_ps(inside, w + i), move));
    }
}

#endif
