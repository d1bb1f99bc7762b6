/* Linear layers in float32: for the few that read or write codes, which bfloat16 would round by more than sigma.

   C (m, n) = or += A B, where A's element (i, l) is a[i * down + l * along], and B is by rows. Eight rows of two registers at
   a time: 16 sums that do not wait for each other. */

#include "linear.h"

static void exact_product(const float *a, long down, long along, const float *b, const float *bias, int add, float *c, long m,
                          long n, long k) {
    long rows = (m + 7) / 8, columns = (n + 31) / 32;
#pragma omp for schedule(static) nowait
    for (long t = 0; t < rows * columns; t++) {
        long i = t / columns * 8, j = t % columns * 32;
        __mmask16 inside[2] = {first16(n - j), first16(n - j - HALF)};
        __m512 sum[8][2];
        for (int h = 0; h < 2; h++)
            for (int r = 0; r < 8; r++)
                sum[r][h] = bias ? _mm512_maskz_loadu_ps(inside[h], bias + j + h * HALF) : _mm512_setzero_ps();
        const float *row[8];
        for (int r = 0; r < 8; r++) row[r] = a + least(i + r, m - 1) * down;
        for (long l = 0; l < k; l++) {
            __m512 left = _mm512_maskz_loadu_ps(inside[0], b + l * n + j);
            __m512 right = _mm512_maskz_loadu_ps(inside[1], b + l * n + j + HALF);
            for (int r = 0; r < 8; r++) {
                __m512 one = _mm512_set1_ps(row[r][l * along]);
                sum[r][0] = _mm512_fmadd_ps(one, left, sum[r][0]);
                sum[r][1] = _mm512_fmadd_ps(one, right, sum[r][1]);
            }
        }
        for (long r = 0; r < least(8, m - i); r++)
            for (int h = 0; h < 2; h++) {
                float *to = c + (i + r) * n + j + h * HALF;
                if (add) sum[r][h] = _mm512_add_ps(sum[r][h], _mm512_maskz_loadu_ps(inside[h], to));
                _mm512_mask_storeu_ps(to, inside[h], sum[r][h]);
            }
    }
}

/* scratch: n k float32 numbers */
void exact_forward_shared(const float *x, const float *w, const float *b, float *y, long m, long n, long k, float *scratch) {
#pragma omp for schedule(static)
    for (long l = 0; l < k; l++)
        for (long j = 0; j < n; j++) scratch[l * n + j] = w[j * k + l];
    exact_product(x, k, 1, scratch, b, 0, y, m, n, k);
#pragma omp barrier
}

void exact_backward_shared(const float *x, const float *w, const float *dy, float *dw, float *db, float *dx, long m, long n,
                           long k) {
    if (dx) exact_product(dy, n, 1, w, 0, 0, dx, m, k, n);
    if (dw) exact_product(dy, 1, n, x, 0, 1, dw, n, k, m);
    if (db) {
#pragma omp for schedule(static) nowait
        for (long j = 0; j < n; j++) {
            float sum = 0;
            for (long i = 0; i < m; i++) sum += dy[i * n + j];
            db[j] += sum;
        }
    }
#pragma omp barrier
}
