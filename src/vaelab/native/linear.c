/* Linear layers: y = x w' + b, and what backward needs of it. Scratch is given by the caller, in bfloat16 numbers:

       forward    parts (up(n) up(k) + up(m) up(k))
       backward   parts (2 up(m) up(n) + up(m) up(k) + up(n) up(k))

   A network's weights, gradients and moments do not fit the caches near a core, and what is read or written is new to them at
   each step. So w is read row after row, as the processor expects; what is converted stays with the thread that needs it; and
   dw is asked for one block ahead. */

#include "linear.h"
#include "rows.h"

/* The 16 columns of x (m, n) from 16 j as rows of A: out (up(n), up(m)). */
static inline void as_16_rows(const float *x, long m, long n, long j, bf16 *out, int parts, long part) {
    __mmask16 inside = first16(n - 16 * j);
    for (long i = 0; i < up(m); i += 32)
        for (int p = 0; p < parts; p++) {
            __m512i r[16];
            for (long h = 0; h < 16; h++) {
                const float *row = x + (i + 2 * h) * n + 16 * j;
                __m512 a = _mm512_maskz_loadu_ps(i + 2 * h < m ? inside : 0, row);
                __m512 b = _mm512_maskz_loadu_ps(i + 2 * h + 1 < m ? inside : 0, row + n);
                for (int q = 0; q < p; q++) a = rest(a), b = rest(b);
                r[h] = pairs(a, b);
            }
            transpose(r);
            for (long h = 0; h < 16; h++) _mm512_storeu_si512(out + p * part + (16 * j + h) * up(m) + i, r[h]);
        }
}

/* x (depth, n) as B itself, K = up(depth): the panels from `begin` to `end`, row after row. */
static inline void as_panels(const float *x, long depth, long n, long begin, long end, bf16 *out, int parts, long part) {
    long k = up(depth);
    for (long i = 0; i < k; i += 2)
        for (long j = begin; j < end; j++) {
            __mmask16 inside = first16(n - j * HALF);
            const float *row = x + i * n + j * HALF;
            __m512 a = _mm512_maskz_loadu_ps(i < depth ? inside : 0, row);
            __m512 b = _mm512_maskz_loadu_ps(i + 1 < depth ? inside : 0, row + n);
            for (int p = 0; p < parts; p++) {
                _mm512_storeu_si512(out + p * part + j * k * HALF + i * HALF, pairs(a, b));
                if (p + 1 < parts) a = rest(a), b = rest(b);
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

/* Both with the number of parts known, so that the compiler makes one form of each. */
static inline __attribute__((always_inline)) void forward_of(const float *x, const float *w, const float *bias, float *y, long m,
                                                              long n, long k, const int parts, bf16 *scratch) {
    long depth = up(k), blocks = up(n) / SIDE, part = up(n) * depth, other = up(m) * depth;
    bf16 *rows = scratch, *columns = scratch + parts * part;
    float sums[SIDE * SIDE] __attribute__((aligned(64)));
    begin_tiles();
#pragma omp for schedule(static)
    for (long j = 0; j < up(m) / HALF; j++)
        panel(x + j * HALF * k, m - j * HALF, k, columns + j * HALF * depth, parts, other);
#pragma omp for schedule(static)
    for (long t = 0; t < blocks; t++) {
        for (long i = t * SIDE; i < (t + 1) * SIDE; i++) as_row(w, n, k, i, rows, parts, part);
        for (long i = 0; i < m; i += SIDE) {
            Panels b = {columns + i * depth, HALF * depth, other, parts};
            block((Rows){rows + t * SIDE * depth, depth, part}, b, depth, parts, sums, SIDE);
            put_transposed(sums, bias, m, n, i, t * SIDE, y);
        }
    }
    end_tiles();
}

static inline __attribute__((always_inline)) void backward_of(const float *x, const float *w, const float *dy, float *dw,
                                                               float *db, float *dx, long m, long n, long k, const int parts,
                                                               int add, double *squares, bf16 *scratch, int threads) {
    long mn = up(m) * up(n), mk = up(m) * up(k), nk = up(n) * up(k);
    bf16 *down = scratch, *inputs = down + parts * mn, *across = inputs + parts * mk, *weights = across + parts * mn;
    long panels = up(k) / HALF, strip = (panels + threads - 1) / threads;
    float sums[SIDE * SIDE] __attribute__((aligned(64)));
    begin_tiles();
    if (dw) {
#pragma omp for schedule(static)
        for (long s = 0; s < threads; s++)
            as_panels(x, m, k, least(panels, s * strip), least(panels, (s + 1) * strip), inputs, parts, mk);
#pragma omp for schedule(static) nowait
        for (long t = 0; t < up(n) / SIDE; t++) {
            double total = 0;
            as_16_rows(dy, m, n, 2 * t, down, parts, mn);
            as_16_rows(dy, m, n, 2 * t + 1, down, parts, mn);
            expect(dw, n, k, t * SIDE, 0);
            for (long j = 0; j < up(k); j += SIDE) {
                if (j + SIDE < k) expect(dw, n, k, t * SIDE, j + SIDE);
                Panels b = {inputs + j * up(m), HALF * up(m), mk, parts};
                block((Rows){down + t * SIDE * up(m), up(m), mn}, b, up(m), parts, sums, SIDE);
                total += put(sums, add, n, k, t * SIDE, j, dw);
            }
            if (squares) squares[t] = total;
        }
    }
    if (db) {
#pragma omp for schedule(static) nowait
        for (long j = 0; j < up(n); j += HALF) {
            __mmask16 inside = first16(n - j);
            __m512 sum = add ? _mm512_maskz_loadu_ps(inside, db + j) : _mm512_setzero_ps();
            for (long i = 0; i < m; i++) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, dy + i * n + j));
            _mm512_mask_storeu_ps(db + j, inside, sum);
            if (squares) squares[up(n) / SIDE + j / HALF] = _mm512_reduce_add_ps(_mm512_mul_ps(sum, sum));
        }
    }
    if (dx) {
#pragma omp for schedule(static) nowait
        for (long i = 0; i < up(m); i++) as_row(dy, m, n, i, across, parts, mn);
#pragma omp for schedule(static)
        for (long s = 0; s < threads; s++)
            as_panels(w, n, k, least(panels, s * strip), least(panels, (s + 1) * strip), weights, parts, nk);
#pragma omp for schedule(static) nowait
        for (long j = 0; j < up(k); j += SIDE)
            for (long i = 0; i < m; i += SIDE) {
                Panels b = {weights + j * up(n), HALF * up(n), nk, parts};
                block((Rows){across + i * up(n), up(n), mn}, b, up(n), parts, sums, SIDE);
                put(sums, 0, m, k, i, j, dx);
            }
    }
#pragma omp barrier
    end_tiles();
}

void linear_forward_shared(const float *x, const float *w, const float *b, float *y, long m, long n, long k, int parts,
                           bf16 *scratch) {
    if (parts == FULL)
        forward_of(x, w, b, y, m, n, k, FULL, scratch);
    else
        forward_of(x, w, b, y, m, n, k, COARSE, scratch);
}

void linear_backward_shared(const float *x, const float *w, const float *dy, float *dw, float *db, float *dx, long m, long n,
                            long k, int parts, int add, double *squares, bf16 *scratch, int threads) {
    if (parts == FINE)
        backward_of(x, w, dy, dw, db, dx, m, n, k, FINE, add, squares, scratch, threads);
    else
        backward_of(x, w, dy, dw, db, dx, m, n, k, COARSE, add, squares, scratch, threads);
}

void linear_forward(const float *x, const float *w, const float *b, float *y, long m, long n, long k, int parts, bf16 *scratch,
                    int threads) {
#pragma omp parallel num_threads(threads)
    {
        unsigned control = begin_flushing();
        linear_forward_shared(x, w, b, y, m, n, k, parts, scratch);
        end_flushing(control);
    }
}

void linear_backward(const float *x, const float *w, const float *dy, float *dw, float *db, float *dx, long m, long n, long k,
                     int parts, bf16 *scratch, int threads) {
#pragma omp parallel num_threads(threads)
    {
        unsigned control = begin_flushing();
        linear_backward_shared(x, w, dy, dw, db, dx, m, n, k, parts, 1, 0, scratch, threads);
        end_flushing(control);
    }
}
