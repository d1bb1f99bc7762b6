/* Codes: z = mean + sigma eps, whose posterior q(z|x) is a diagonal Gaussian and whose prior p(z) is a standard normal, and the way
   back. What an encoder gives are the means and the log variances, (images, 2 dim). All threads of a parallel region call both. */

#ifndef CODES_H
#define CODES_H

#include "functions.h"
#include "tiles.h"

/* (k, images, dim) and their gradient; the rate KL(q(z|x) || p(z)) of each image. */
typedef struct {
    long dim;
    float *at, *gradient, *rate;
} Codes;

/* The codes, and their rates; noise is of their shape. */
static inline void draw(const Codes *z, const float *parameters, const float *noise, long images, long k) {
    long dim = z->dim;
    const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
#pragma omp for schedule(static)
    for (long i = 0; i < images; i++) {
        __m512 rate = _mm512_setzero_ps();
        for (long j = 0; j < dim; j += 16) {
            __mmask16 inside = first16(dim - j);
            __m512 mean = _mm512_maskz_loadu_ps(inside, parameters + i * 2 * dim + j);
            __m512 log_std = _mm512_mul_ps(half, _mm512_maskz_loadu_ps(inside, parameters + i * 2 * dim + dim + j));
            __m512 variance = exp16(_mm512_add_ps(log_std, log_std)), std = exp16(log_std);
            __m512 kl = _mm512_fmadd_ps(mean, mean, _mm512_sub_ps(variance, one));
            rate = _mm512_mask_add_ps(rate, inside, rate, _mm512_fmsub_ps(half, kl, log_std));
            for (long s = 0; s < k; s++) {
                long at = (s * images + i) * dim + j;
                _mm512_mask_storeu_ps(z->at + at, inside, _mm512_fmadd_ps(std, _mm512_maskz_loadu_ps(inside, noise + at), mean));
            }
        }
        z->rate[i] = _mm512_reduce_add_ps(rate);
    }
}

/* The gradient of the parameters, from that of the codes and `weight` times that of the rate. Adds the
   squares to *size, in any order. */
static inline void draw_backward(const Codes *z, const float *parameters, const float *noise, float weight, long images,
                                 long k, float *to, double *size) {
    long dim = z->dim;
    const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f), share = _mm512_set1_ps(weight);
    double sum = 0;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < images; i++) {
        __m512 squares = _mm512_setzero_ps();
        for (long j = 0; j < dim; j += 16) {
            __mmask16 inside = first16(dim - j);
            const float *mean_at = parameters + i * 2 * dim + j;
            __m512 log_std = _mm512_mul_ps(half, _mm512_maskz_loadu_ps(inside, mean_at + dim));
            __m512 variance = exp16(_mm512_add_ps(log_std, log_std)), std = exp16(log_std);
            __m512 of_mean = _mm512_mul_ps(share, _mm512_maskz_loadu_ps(inside, mean_at));
            __m512 of_log_std = _mm512_mul_ps(share, _mm512_sub_ps(variance, one));
            for (long s = 0; s < k; s++) {
                long at = (s * images + i) * dim + j;
                __m512 g = _mm512_maskz_loadu_ps(inside, z->gradient + at);
                of_mean = _mm512_add_ps(of_mean, g);
                of_log_std = _mm512_fmadd_ps(g, _mm512_mul_ps(std, _mm512_maskz_loadu_ps(inside, noise + at)), of_log_std);
            }
            of_log_std = _mm512_mul_ps(half, of_log_std);
            squares = _mm512_mask3_fmadd_ps(of_mean, of_mean, squares, inside);
            squares = _mm512_mask3_fmadd_ps(of_log_std, of_log_std, squares, inside);
            _mm512_mask_storeu_ps(to + i * 2 * dim + j, inside, of_mean);
            _mm512_mask_storeu_ps(to + i * 2 * dim + dim + j, inside, of_log_std);
        }
        sum += _mm512_reduce_add_ps(squares);
    }
#pragma omp atomic
    *size += sum;
#pragma omp barrier
}

#endif
