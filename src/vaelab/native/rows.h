/* Float32 rows on their way into a product: as rows of A, or as columns of B (see `tiles.h`). */

#ifndef ROWS_H
#define ROWS_H

#include "tiles.h"

/* Rows of x (m, k) as rows of A: out (up(m), up(k)). Row i. */
static inline void as_row(const float *x, long m, long k, long i, bf16 *out) {
    for (long j = 0; j < up(k); j += 32) {
        __m512i both = _mm512_setzero_si512();
        if (i < m)
            both = narrow(_mm512_maskz_loadu_ps(first16(k - j), x + i * k + j),
                          _mm512_maskz_loadu_ps(first16(k - j - 16), x + i * k + j + 16));
        _mm512_storeu_si512(out + i * up(k) + j, both);
    }
}

/* The same number in three parts, lo, mid and hi, whose sum it is: a row has 3 up(k) numbers. (Henry, Tang & Heinecke 2019,
   arXiv 1904.06376.) The small ones come first, so that a sum over all three rounds no more than one of float32 numbers. */
static inline void as_row_of_parts(const float *x, long m, long k, long i, bf16 *out) {
    for (long j = 0; j < up(k); j += 32) {
        __m512 rest[2];
        for (int h = 0; h < 2; h++)
            rest[h] = _mm512_maskz_loadu_ps(i < m ? first16(k - j - h * 16) : 0, x + i * k + j + h * 16);
        for (int part = 2; part >= 0; part--) {
            __m512i both = narrow(rest[0], rest[1]);
            _mm512_storeu_si512(out + (3 * i + part) * up(k) + j, both);
            for (int h = 0; h < 2; h++) {
                __m256i half = h ? _mm512_extracti64x4_epi64(both, 1) : _mm512_castsi512_si256(both);
                rest[h] = _mm512_sub_ps(rest[h], (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            }
        }
    }
}

/* Rows of x (m, k) as columns of B, K = up(k): the 16 rows from 16 p, which make panel p. */
static inline void as_columns(const float *x, long m, long k, long p, bf16 *out) {
    out += p * up(k) * HALF;
    for (long j = 0; j < up(k); j += 32) {
        __m512i r[16];
        for (long i = 0; i < 16; i++) {
            const float *row = x + (p * 16 + i) * k + j;
            int inside = p * 16 + i < m;
            r[i] = narrow(_mm512_maskz_loadu_ps(inside ? first16(k - j) : 0, row),
                          _mm512_maskz_loadu_ps(inside ? first16(k - j - 16) : 0, row + 16));
        }
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + j * HALF + i * 32, r[i]);
    }
}

#endif
