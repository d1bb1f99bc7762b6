/* Linear layers: y = x w' + b, and what backward needs of it. Float32 in and out, products of bfloat16 with float32 sums.

   x (m, k), w (n, k), b (n), y and its gradient dy (m, n), all by rows. Scratch is bfloat16, given by the caller:

       forward    up(n) up(k) + up(m) up(k)
       backward   2 up(m) up(n) + up(m) up(k) + up(n) up(k)

   A network's weights, gradients and moments do not fit the caches near a core, and what is read or written is new to them at
   each step. So w is read row after row, as the processor expects; what is converted stays with the thread that needs it; and
   dw is asked for one block ahead. */

#include "rows.h"

/* Columns of x (m, n) as rows of A: out (up(n), up(m)). The 16 columns from 16 j. */
static inline void as_16_rows(const float *x, long m, long n, long j, bf16 *out) {
    __mmask16 inside = first16(n - 16 * j);
    for (long i = 0; i < up(m); i += 32) {
        __m512i r[16];
        for (long p = 0; p < 16; p++) {
            const float *row = x + (i + 2 * p) * n + 16 * j;
            r[p] = pairs(_mm512_maskz_loadu_ps(i + 2 * p < m ? inside : 0, row),
                         _mm512_maskz_loadu_ps(i + 2 * p + 1 < m ? inside : 0, row + n));
        }
        transpose(r);
        for (long p = 0; p < 16; p++) _mm512_storeu_si512(out + (16 * j + p) * up(m) + i, r[p]);
    }
}

/* x (depth, n) as B itself, K = up(depth): the panels from `begin` to `end`, row after row. */
static inline void as_panels(const float *x, long depth, long n, long begin, long end, bf16 *out) {
    long k = up(depth);
    for (long i = 0; i < k; i += 2)
        for (long p = begin; p < end; p++) {
            __mmask16 inside = first16(n - p * HALF);
            const float *row = x + i * n + p * HALF;
            __m512 a = _mm512_maskz_loadu_ps(i < depth ? inside : 0, row);
            __m512 b = _mm512_maskz_loadu_ps(i + 1 < depth ? inside : 0, row + n);
            _mm512_storeu_si512(out + p * k * HALF + i * HALF, pairs(a, b));
        }
}

/* c (m, n) = or += the block of sums that begins at row i, column j. */
static inline void put(const float *sums, int add, long m, long n, long i, long j, float *c) {
    for (int h = 0; h < 2; h++) {
        __mmask16 inside = first16(n - j - h * HALF);
        float *to = c + i * n + j + h * HALF;
        for (long r = 0; r < least(SIDE, m - i); r++, to += n) {
            __m512 sum = _mm512_load_ps(sums + r * SIDE + h * HALF);
            if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, to));
            _mm512_mask_storeu_ps(to, inside, sum);
        }
    }
}

/* c (m, n) = the block of sums (columns by rows) that begins at row i, column j of c, plus bias (n) or null. */
static inline void put_transposed(const float *sums, const float *bias, long m, long n, long i, long j, float *c) {
    for (int h = 0; h < 2; h++)
        for (int g = 0; g < 2; g++) {
            long column = j + h * HALF, row = i + g * HALF;
            __mmask16 inside = first16(n - column);
            __m512 start = bias ? _mm512_maskz_loadu_ps(inside, bias + column) : _mm512_setzero_ps();
            __m512i r[16];
            for (int q = 0; q < 16; q++) r[q] = _mm512_load_si512(sums + (h * HALF + q) * SIDE + g * HALF);
            transpose(r);
            for (long q = 0; q < least(HALF, m - row); q++)
                _mm512_mask_storeu_ps(c + (row + q) * n + column, inside, _mm512_add_ps(start, (__m512)r[q]));
        }
}

/* The lines of a block of c, to be written soon. */
static inline void expect(const float *c, long m, long n, long i, long j) {
    for (long r = 0; r < least(SIDE, m - i); r++) {
        __builtin_prefetch(c + (i + r) * n + j, 1, 2);
        if (j + HALF < n) __builtin_prefetch(c + (i + r) * n + j + HALF, 1, 2);
    }
}

void linear_forward(const float *x, const float *w, const float *b, float *y, long m, long n, long k, bf16 *scratch,
                    int threads) {
    bf16 *rows = scratch, *columns = scratch + up(n) * up(k);
    long depth = up(k), blocks = up(n) / SIDE;
#pragma omp parallel num_threads(threads)
    {
        float sums[SIDE * SIDE] __attribute__((aligned(64)));
        begin_tiles();
#pragma omp for schedule(static)
        for (long p = 0; p < up(m) / HALF; p++) as_columns(x, m, k, p, columns);
#pragma omp for schedule(static)
        for (long t = 0; t < blocks; t++) {
            for (long i = t * SIDE; i < (t + 1) * SIDE; i++) as_row(w, n, k, i, rows);
            for (long i = 0; i < m; i += SIDE) {
                block(rows + t * SIDE * depth, depth, columns + i * depth, columns + (i + HALF) * depth, depth, sums);
                put_transposed(sums, b, m, n, i, t * SIDE, y);
            }
        }
        end_tiles();
    }
}

/* dw += dy' x and db += the sums of dy over rows, db or null; dx = dy w, or null. */
void linear_backward(const float *x, const float *w, const float *dy, float *dw, float *db, float *dx, long m, long n,
                     long k, bf16 *scratch, int threads) {
    bf16 *down = scratch, *inputs = down + up(n) * up(m), *across = inputs + up(m) * up(k), *weights = across + up(m) * up(n);
    long panels = up(k) / HALF, columns = up(k) / SIDE, strip = (panels + threads - 1) / threads;
#pragma omp parallel num_threads(threads)
    {
        float sums[SIDE * SIDE] __attribute__((aligned(64)));
        begin_tiles();
        if (dw) {
#pragma omp for schedule(static)
            for (long s = 0; s < threads; s++)
                as_panels(x, m, k, least(panels, s * strip), least(panels, (s + 1) * strip), inputs);
#pragma omp for schedule(static) nowait
            for (long t = 0; t < up(n) / SIDE; t++) {
                as_16_rows(dy, m, n, 2 * t, down);
                as_16_rows(dy, m, n, 2 * t + 1, down);
                expect(dw, n, k, t * SIDE, 0);
                for (long j = 0; j < columns * SIDE; j += SIDE) {
                    if (j + SIDE < k) expect(dw, n, k, t * SIDE, j + SIDE);
                    block(down + t * SIDE * up(m), up(m), inputs + j * up(m), inputs + (j + HALF) * up(m), up(m), sums);
                    put(sums, 1, n, k, t * SIDE, j, dw);
                }
            }
        }
        if (db) {
#pragma omp for schedule(static) nowait
            for (long j = 0; j < n; j += 16) {
                __mmask16 inside = first16(n - j);
                __m512 sum = _mm512_setzero_ps();
                for (long i = 0; i < m; i++) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, dy + i * n + j));
                _mm512_mask_storeu_ps(db + j, inside, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, db + j)));
            }
        }
        if (dx) {
#pragma omp for schedule(static) nowait
            for (long i = 0; i < up(m); i++) as_row(dy, m, n, i, across);
#pragma omp for schedule(static)
            for (long s = 0; s < threads; s++)
                as_panels(w, n, k, least(panels, s * strip), least(panels, (s + 1) * strip), weights);
#pragma omp for schedule(static)
            for (long j = 0; j < columns * SIDE; j += SIDE)
                for (long i = 0; i < m; i += SIDE) {
                    block(across + i * up(n), up(n), weights + j * up(n), weights + (j + HALF) * up(n), up(n), sums);
                    put(sums, 0, m, k, i, j, dx);
                }
        }
        end_tiles();
    }
}
