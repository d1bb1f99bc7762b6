/* Float32 rows on their way into a product: as rows of A, or as columns of B, in one part or several (see `tiles.h`). */

#ifndef ROWS_H
#define ROWS_H

#include "tiles.h"

/* Row i of x (m, k) as a row of A: out (up(m), up(k)), `part` numbers from one part to the next. */
static inline void as_row(const float *x, long m, long k, long i, bf16 *out, int parts, long part) {
    for (long j = 0; j < up(k); j += 32) {
        __m512 a = _mm512_setzero_ps(), b = a;
        if (i < m) {
            a = _mm512_maskz_loadu_ps(first16(k - j), x + i * k + j);
            b = _mm512_maskz_loadu_ps(first16(k - j - 16), x + i * k + j + 16);
        }
        for (int p = 0; p < parts; p++) {
            _mm512_storeu_si512(out + p * part + i * up(k) + j, narrow(a, b));
            if (p + 1 < parts) a = rest(a), b = rest(b);
        }
    }
}

/* The first 16 rows of x (rows, k), zeros where there are fewer, as the columns of a panel of B, K = up(k). */
static inline void panel(const float *x, long rows, long k, bf16 *out, int parts, long part) {
    for (long j = 0; j < up(k); j += 32)
        for (int p = 0; p < parts; p++) {
            __m512i r[16];
            for (long i = 0; i < 16; i++) {
                const float *row = x + i * k + j;
                __m512 a = _mm512_maskz_loadu_ps(i < rows ? first16(k - j) : 0, row);
                __m512 b = _mm512_maskz_loadu_ps(i < rows ? first16(k - j - 16) : 0, row + 16);
                for (int q = 0; q < p; q++) a = rest(a), b = rest(b);
                r[i] = narrow(a, b);
            }
            transpose(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + p * part + j * HALF + i * 32, r[i]);
        }
}

#endif
