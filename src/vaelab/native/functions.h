/* Functions of 16 float32 numbers at once, to 3 units in the last place. */

#ifndef FUNCTIONS_H
#define FUNCTIONS_H

#include <immintrin.h>

/* 1 / x for normal x: the processor's estimate of 14 bits, and one step of Newton's, in a quarter of the time of a division. */
static inline __m512 reciprocal16(__m512 x) {
    __m512 r = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(1.0f)), r);
}

/* The square root of x, which is 0 or normal, in the same way: y = x r, y + y (1 - y r) / 2. */
static inline __m512 root16(__m512 x) {
    __m512 r = _mm512_min_ps(_mm512_rsqrt14_ps(x), _mm512_set1_ps(1e30f)), y = _mm512_mul_ps(x, r); /* of 0 it is infinite */
    return _mm512_fmadd_ps(_mm512_mul_ps(y, _mm512_set1_ps(0.5f)), _mm512_fnmadd_ps(y, r, _mm512_set1_ps(1.0f)), y);
}

/* 2^n e^r, |r| <= log(2) / 2: the polynomial that is e^r at Chebyshev's seven places, to 2e-8 of it. */
static inline __m512 exp_of(__m512 n, __m512 r) {
    __m512 p = _mm512_set1_ps(1.3941213e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3752098e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1666351e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666414e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

#define LOG_2 0.693359375f /* in two parts, the first of few bits */
#define LOG_2_REST -2.12194440e-4f

/* Below -87 it is e^-87: smaller numbers are not normal, and cost a hundred cycles each (a sum over a row of wide-spread exponents
   took ten times as long). */
static inline __m512 exp16(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x)); /* in this order: x, if no number */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LOG_2), x);
    return exp_of(n, _mm512_fnmadd_ps(n, _mm512_set1_ps(LOG_2_REST), r));
}

/* 1 / (1 + e^-x); beyond 87 what it is there, so that all numbers on the way are finite. */
static inline __m512 sigmoid16(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmsub_ps(n, _mm512_set1_ps(LOG_2), x);
    __m512 e = exp_of(n, _mm512_fnmadd_ps(n, _mm512_set1_ps(LOG_2_REST), r));
    return reciprocal16(_mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* sin x and cos x for |x| < 10^4 or so: the rest of x / (pi / 2), and which quarter of the circle it is in */
static inline void sincos16(__m512 x, __m512 *sine, __m512 *cosine) {
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.63661977f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.57079637f), x); /* pi / 2 in two parts */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-4.37113883e-8f), r);
    __m512 q = _mm512_mul_ps(r, r);
    __m512 s = _mm512_fmadd_ps(q, _mm512_set1_ps(2.7557319e-6f), _mm512_set1_ps(-1.9841270e-4f));
    s = _mm512_fmadd_ps(q, s, _mm512_set1_ps(8.3333333e-3f));
    s = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-1.6666667e-1f));
    s = _mm512_fmadd_ps(_mm512_mul_ps(q, s), r, r);
    __m512 c = _mm512_fmadd_ps(q, _mm512_set1_ps(2.4801587e-5f), _mm512_set1_ps(-1.3888889e-3f));
    c = _mm512_fmadd_ps(q, c, _mm512_set1_ps(4.1666667e-2f));
    c = _mm512_fmadd_ps(q, c, _mm512_set1_ps(-0.5f));
    c = _mm512_fmadd_ps(q, c, _mm512_set1_ps(1.0f));
    __m512i quarter = _mm512_cvtps_epi32(n);
    __mmask16 swap = _mm512_test_epi32_mask(quarter, _mm512_set1_epi32(1));
    __m512i below = _mm512_slli_epi32(_mm512_and_si512(quarter, _mm512_set1_epi32(2)), 30);
    __m512i left = _mm512_slli_epi32(
        _mm512_and_si512(_mm512_add_epi32(quarter, _mm512_set1_epi32(1)), _mm512_set1_epi32(2)), 30);
    *sine = (__m512)_mm512_xor_si512((__m512i)_mm512_mask_blend_ps(swap, s, c), below);
    *cosine = (__m512)_mm512_xor_si512((__m512i)_mm512_mask_blend_ps(swap, c, s), left);
}

#endif
