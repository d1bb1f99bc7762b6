/* Linear layers: y = x w' + b, and what backward needs of it.

   A network's weights, gradients and moments do not fit the caches near a core, and what is read or written is new to them at
   each step. So w is read row after row, as the processor expects, once for both of its products; what is converted stays with
   the thread that needs it; and dw is asked for one block ahead. */

#include <omp.h>

#include "linear.h"
#include "rows.h"

/* The 16 columns of x (m, n) from 16 j as rows of A: out (16, up(m)). */
static inline void as_16_rows(const float *x, long m, long n, long j, bf16 *out) {
    __mmask16 inside = first16(n - 16 * j);
    for (long i = 0; i < up(m); i += 32) {
        __m512i r[16];
#pragma GCC unroll 16
        for (long h = 0; h < 16; h++) {
            const float *row = x + (i + 2 * h) * n + 16 * j;
            __m512 a = _mm512_maskz_loadu_ps(i + 2 * h < m ? inside : 0, row);
            __m512 b = _mm512_maskz_loadu_ps(i + 2 * h + 1 < m ? inside : 0, row + n);
            r[h] = pairs(a, b);
        }
        transpose(r);
#pragma GCC unroll 16
        for (long h = 0; h < 16; h++) _mm512_storeu_si512(out + h * up(m) + i, r[h]);
    }
}

/* x (depth, n) as B itself, K = depth: the panels from `begin` to `end`, row after row. */
static inline void as_panels(const float *x, long depth, long n, long begin, long end, bf16 *out) {
    long k = up(depth);
    for (long i = 0; i < k; i += 2)
        for (long j = begin; j < end; j++) {
            __mmask16 inside = first16(n - j * HALF);
            const float *row = x + i * n + j * HALF;
            __m512 a = _mm512_maskz_loadu_ps(i < depth ? inside : 0, row);
            __m512 b = _mm512_maskz_loadu_ps(i + 1 < depth ? inside : 0, row + n);
            _mm512_storeu_si512(out + j * apart(depth) + i * HALF, pairs(a, b));
        }
}

/* c (m, n) = the block of sums (columns by rows) that begins at row i, column j of c, and what follows. */
static inline void put_transposed(const float *sums, Forward then, long m, long n, long i, long j, float *c) {
    for (int h = 0; h < 2; h++)
        for (int g = 0; g < 2; g++) {
            long column = j + h * HALF, row = i + g * HALF;
            __mmask16 inside = first16(n - column);
            __m512 start = then.start ? _mm512_maskz_loadu_ps(inside, then.start + column) : _mm512_setzero_ps();
            __m512i r[16];
#pragma GCC unroll 16
            for (int q = 0; q < 16; q++) r[q] = _mm512_load_si512(sums + (h * HALF + q) * SIDE + g * HALF);
            transpose(r);
#pragma GCC unroll 16
            for (long q = 0; q < HALF; q++) {
                if (row + q >= m) break;
                long at = (row + q) * n + column;
                __m512 sum = _mm512_add_ps(start, (__m512)r[q]);
                _mm512_mask_storeu_ps(c + at, inside, activated(then.activation, sum, then.slopes + at, inside));
            }
        }
}

/* The lines of a block of c, to be written soon. */
static inline void expect(const float *c, long m, long n, long i, long j) {
    for (long r = 0; r < least(SIDE, m - i); r++) {
        __builtin_prefetch(c + (i + r) * n + j, 1, 2);
        if (j + HALF < n) __builtin_prefetch(c + (i + r) * n + j + HALF, 1, 2);
    }
}

/* 32 rows of x (depth, n) from row i on their way: as rows of A, and as pairs of B, K = depth, where `panels` has room; what they
   write to a panel is one piece. */
static inline void some_rows(const float *x, long depth, long n, long i, bf16 *rows, bf16 *panels) {
    for (long j = 0; j < up(n); j += 32) {
        __mmask16 left = first16(n - j), right = first16(n - j - 16);
        bf16 *to = panels + j / HALF * apart(depth) + i * HALF;
        for (long h = 0; h < SIDE; h += 2) {
            const float *row = x + (i + h) * n + j;
            __mmask16 first = i + h < depth ? 0xffff : 0, second = i + h + 1 < depth ? 0xffff : 0;
            __m512 a = _mm512_maskz_loadu_ps(left & first, row), b = _mm512_maskz_loadu_ps(right & first, row + 16);
            __m512 c = _mm512_maskz_loadu_ps(left & second, row + n), d = _mm512_maskz_loadu_ps(right & second, row + n + 16);
            _mm512_storeu_si512(rows + h * up(n) + j, narrow(a, b));
            _mm512_storeu_si512(rows + (h + 1) * up(n) + j, narrow(c, d));
            if (panels) {
                _mm512_storeu_si512(to + h * HALF, pairs(a, c));
                _mm512_storeu_si512(to + apart(depth) + h * HALF, pairs(b, d));
            }
        }
    }
}

/* 16 rows of x (m, k) from row i as the columns of a panel of B, K = up(k), and as pairs of B with K = m where `inputs` has
   room. Returns the sum of their squares. */
static inline double sixteen_rows(const float *x, long m, long k, long i, bf16 *columns, bf16 *inputs) {
    __m512 squares = _mm512_setzero_ps();
    for (long j = 0; j < up(k); j += 32) {
        __m512i r[16];
        __mmask16 left = first16(k - j), right = first16(k - j - 16);
#pragma GCC unroll 8
        for (long h = 0; h < 16; h += 2) {
            const float *row = x + (i + h) * k + j;
            __mmask16 first = i + h < m ? 0xffff : 0, second = i + h + 1 < m ? 0xffff : 0;
            __m512 a = _mm512_maskz_loadu_ps(left & first, row), b = _mm512_maskz_loadu_ps(right & first, row + 16);
            __m512 c = _mm512_maskz_loadu_ps(left & second, row + k), d = _mm512_maskz_loadu_ps(right & second, row + k + 16);
            squares = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, squares));
            squares = _mm512_fmadd_ps(c, c, _mm512_fmadd_ps(d, d, squares));
            r[h] = narrow(a, b);
            r[h + 1] = narrow(c, d);
            if (inputs) {
                bf16 *to = inputs + j / HALF * apart(m) + (i + h) * HALF;
                _mm512_storeu_si512(to, pairs(a, c));
                _mm512_storeu_si512(to + apart(m), pairs(b, d));
            }
        }
        transpose(r);
#pragma GCC unroll 16
        for (int h = 0; h < 16; h++) _mm512_storeu_si512(columns + j * HALF + h * 32, r[h]);
    }
    return _mm512_reduce_add_ps(squares);
}

void linear_read_shared(const float *x, long m, long k, bf16 *columns, bf16 *inputs, double *size) {
    double squares = 0;
#pragma omp for schedule(static)
    for (long j = 0; j < up(m); j += HALF) squares += sixteen_rows(x, m, k, j, columns + j * up(k), inputs);
    if (size) {
#pragma omp atomic
        *size += squares;
    }
}

void linear_forward_shared(const bf16 *columns, const float *w, Forward then, const Pixels *pixels, float *y, double *slope,
                           long m, long n, long k, bf16 *weights, bf16 *alone, Turns *turns) {
    long depth = up(k);
    float sums[SIDE * SIDE] __attribute__((aligned(64)));
    double squares = 0;
    begin_tiles();
    for (long strip; (strip = next_piece(turns)) >= 0;) {
        long t = strip * SIDE;
        __m512 totals[SIDE];
        float added[SIDE];
        for (long i = 0; i < SIDE; i++) {
            totals[i] = _mm512_setzero_ps();
            added[i] = t + i < n ? (then.start ? then.start[t + i] : 0) + (pixels && pixels->plus ? pixels->plus[t + i] : 0) : 0;
        }
        some_rows(w, n, k, t, alone, weights);
        for (long i = 0; i < m; i += SIDE) {
            block((Rows){alone, depth, 0}, (Panels){columns + i * depth, HALF * depth, 0, COARSE}, depth, COARSE, sums, SIDE);
            if (pixels)
                squares += score_block(sums, added, pixels, m, n, i, t, totals);
            else
                put_transposed(sums, then, m, n, i, t, y);
        }
        if (pixels)
            for (long i = 0; i < SIDE; i++) pixels->sums[t + i] = _mm512_reduce_add_ps(totals[i]);
    }
    end_tiles();
    if (slope) {
#pragma omp atomic
        *slope += squares;
    }
#pragma omp barrier
}

void linear_turn_shared(const float *dy, long m, long n, bf16 *rows) {
#pragma omp for schedule(static)
    for (long i = 0; i < up(m); i++) as_row(dy, m, n, i, rows, COARSE, 0);
}

void linear_input_shared(const bf16 *rows, const bf16 *weights, Gate gate, float *dx, long m, long n, long k, double *size,
                         Turns *turns) {
    float sums[SIDE * SIDE] __attribute__((aligned(64)));
    double squares = 0;
    begin_tiles();
    for (long strip; (strip = next_piece(turns)) >= 0;)
        for (long i = 0, j = strip * SIDE; i < m; i += SIDE) {
            Panels b = {weights + j / HALF * apart(n), apart(n), 0, COARSE};
            block((Rows){rows + i * up(n), up(n), 0}, b, up(n), COARSE, sums, SIDE);
            squares += put(sums, 0, gate, m, k, i, j, dx);
        }
    end_tiles();
    if (size) {
#pragma omp atomic
        *size += squares;
    }
#pragma omp barrier
}

void linear_across(const float *dy, long m, long n, long t, bf16 *across) {
    for (int h = 0; h < 2; h++) as_16_rows(dy, m, n, 2 * t + h, across + h * HALF * up(m));
}

double linear_rows(const bf16 *across, const bf16 *inputs, float *dw, long m, long n, long k, long t, int add) {
    float sums[SIDE * SIDE] __attribute__((aligned(64)));
    double total = 0;
    long rows = least(SIDE, n - t * SIDE);
    expect(dw, rows, k, 0, 0);
    for (long j = 0; j < up(k); j += SIDE) {
        if (j + SIDE < k) expect(dw, rows, k, 0, j + SIDE);
        Panels b = {inputs + j / HALF * apart(m), apart(m), 0, COARSE};
        block((Rows){across, up(m), 0}, b, up(m), COARSE, sums, SIDE);
        total += put(sums, add, (Gate){IDENTITY, 0}, rows, k, 0, j, dw);
    }
    return total;
}

double linear_bias(const float *dy, float *db, long m, long n, long t, int add) {
    double total = 0;
    for (long h = 0; h < SIDE; h += HALF) {
        __mmask16 inside = first16(n - t * SIDE - h);
        const float *from = dy + t * SIDE + h;
        __m512 sum = add ? _mm512_maskz_loadu_ps(inside, db + h) : _mm512_setzero_ps();
        for (long i = 0; i < m; i++) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, from + i * n));
        _mm512_mask_storeu_ps(db + h, inside, sum);
        total += _mm512_reduce_add_ps(_mm512_mul_ps(sum, sum));
    }
    return total;
}

void linear_forward(const float *x, const float *w, const float *b, float *y, long m, long n, long k, bf16 *scratch, int threads) {
    Turns turns[threads];
    deal(turns, up(n) / SIDE, threads);
#pragma omp parallel num_threads(threads)
    {
        unsigned control = begin_flushing();
        bf16 *alone = scratch + up(m) * up(k) + omp_get_thread_num() * SIDE * up(k);
        linear_read_shared(x, m, k, scratch, 0, 0);
        linear_forward_shared(scratch, w, (Forward){b, IDENTITY, 0}, 0, y, 0, m, n, k, 0, alone, turns);
        end_flushing(control);
    }
}

/* dw and db are added to; each of dw, db and dx may be null. */
void linear_backward(const float *x, const float *w, const float *dy, float *dw, float *db, float *dx, long m, long n, long k,
                     bf16 *scratch, int threads) {
    long panels = up(k) / HALF, strip = (panels + threads - 1) / threads;
    bf16 *across = scratch, *inputs = across + up(m) * up(n), *weights = inputs + panels * apart(m);
    Turns turns[threads];
    deal(turns, up(k) / SIDE, threads);
#pragma omp parallel num_threads(threads)
    {
        unsigned control = begin_flushing();
        bf16 *alone = weights + panels * apart(n) + omp_get_thread_num() * SIDE * up(m);
#pragma omp for schedule(static)
        for (long s = 0; s < threads; s++) {
            long begin = least(panels, s * strip), end = least(panels, (s + 1) * strip);
            if (dw) as_panels(x, m, k, begin, end, inputs);
            if (dx) as_panels(w, n, k, begin, end, weights);
        }
        if (dx) {
            linear_turn_shared(dy, m, n, across);
            linear_input_shared(across, weights, (Gate){IDENTITY, 0}, dx, m, n, k, 0, turns);
        }
        begin_tiles();
#pragma omp for schedule(static)
        for (long t = 0; t < up(n) / SIDE; t++) {
            if (dw) {
                linear_across(dy, m, n, t, alone);
                linear_rows(alone, inputs, dw + t * SIDE * k, m, n, k, t, 1);
            }
            if (db) linear_bias(dy, db + t * SIDE, m, n, t, 1);
        }
        end_tiles();
        end_flushing(control);
    }
}
