/* Products of float32 numbers, with AVX-512's sums of products: a block of 8 rows and 48 columns of c is held in registers. Such
   layers have few inputs or outputs, and take as long in this way as to convert for the tiles what they read. */

#include "exact.h"

/* The numbers of A: row r, step i of the sum is at r * row + i * step. */
typedef struct {
    const float *first;
    long row, step;
} Left;

/* c (rows, columns) = A B + start through the gate, with B (depth, columns), c and B of so many numbers a row. Returns the sum of the squares.
   Loops must be unrolled early, or the compiler keeps the sums in memory. */
static inline __attribute__((always_inline)) __m512 block_of(const int rows, const int vectors, Left a, const float *b, long width,
                                                              long depth, const float *start, Gate gate, float *c, long other, long columns) {
    __m512 sum[8][3], squares = _mm512_setzero_ps();
    __mmask16 inside[3];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
        inside[v] = first16(columns - v * 16);
        sum[0][v] = start ? _mm512_maskz_loadu_ps(inside[v], start + v * 16) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int r = 1; r < rows; r++) sum[r][v] = sum[0][v];
    }
    for (long i = 0; i < depth; i++) {
        __m512 right[3];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) right[v] = _mm512_maskz_loadu_ps(inside[v], b + i * width + v * 16);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512 left = _mm512_set1_ps(a.first[r * a.row + i * a.step]);
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_fmadd_ps(left, right[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) {
            __m512 value = gated(gate.activation, sum[r][v], gate.from + r * other + v * 16, inside[v]);
            squares = _mm512_fmadd_ps(value, value, squares);
            _mm512_mask_storeu_ps(c + r * other + v * 16, inside[v], value);
        }
    return squares;
}

/* Some rows of c (rows, columns), `other` numbers apart, through an activation. */
static void activate(Forward then, float *c, long rows, long columns, long other) {
    if (then.activation != IDENTITY)
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < columns; j += 16) {
                long at = r * other + j;
                __mmask16 inside = first16(columns - j);
                __m512 v = _mm512_maskz_loadu_ps(inside, c + at);
                _mm512_mask_storeu_ps(c + at, inside, activated(then.activation, v, then.slopes + at, inside));
            }
}

/* The same for any number of rows up to 8, and of columns, and what follows. */
static double rows_of(long rows, Left a, const float *b, long width, long depth, Forward then, Gate gate, float *c, long other,
                      long columns) {
    __m512 squares = _mm512_setzero_ps();
    for (long j = 0; j < columns; j += 48) {
        long left = columns - j;
        for (long r = 0; r < rows; r += rows == ROWS ? ROWS : 1) {
            Left at = {a.first + r * a.row, a.row, a.step};
            const float *start = then.start ? then.start + j : 0;
            Gate here = {gate.activation, gate.from + r * other + j};
#define BLOCK(rows, vectors) block_of(rows, vectors, at, b + j, width, depth, start, here, c + r * other + j, other, left)
            squares = _mm512_add_ps(squares, rows == ROWS ? left > 32   ? BLOCK(ROWS, 3)
                                                            : left > 16 ? BLOCK(ROWS, 2)
                                                                        : BLOCK(ROWS, 1)
                                                          : BLOCK(1, 3));
        }
        activate((Forward){0, then.activation, then.slopes + j}, c + j, rows, least(48, left), other);
    }
    return _mm512_reduce_add_ps(squares);
}

/* w (n, k) by columns: out (k, up(n)), zeros where there is nothing. */
static void by_columns(const float *w, long n, long k, float *out) {
    for (long j = 0; j < up(n); j += 16)
        for (long i = 0; i < k; i += 16) {
            __m512i r[16];
#pragma GCC unroll 16
            for (long h = 0; h < 16; h++)
                r[h] = (__m512i)_mm512_maskz_loadu_ps(j + h < n ? first16(k - i) : 0, w + (j + h) * k + i);
            transpose(r);
            for (long h = 0; h < least(16, k - i); h++) _mm512_storeu_si512(out + (i + h) * up(n) + j, r[h]);
        }
}

void exact_forward_shared(const float *x, const float *w, Forward then, float *y, long m, long n, long k, float *alone,
                          Turns *turns) {
    by_columns(w, n, k, alone);
    for (long piece; (piece = next_piece(turns)) >= 0;) {
        long i = piece * ROWS;
        rows_of(least(ROWS, m - i), (Left){x + i * k, k, 1}, alone, up(n), k,
                (Forward){then.start, then.activation, then.slopes + i * n}, (Gate){IDENTITY, 0}, y + i * n, n, n);
    }
#pragma omp barrier
}

void exact_input_shared(const float *dy, const float *w, Gate gate, float *dx, long m, long n, long k, double *size, Turns *turns) {
    double squares = 0;
    for (long piece; (piece = next_piece(turns)) >= 0;) {
        long i = piece * ROWS;
        squares += rows_of(least(ROWS, m - i), (Left){dy + i * n, n, 1}, w, k, n,
                           (Forward){0, IDENTITY, 0}, (Gate){gate.activation, gate.from + i * k}, dx + i * k, k, k);
    }
    if (size) {
#pragma omp atomic
        *size += squares;
    }
#pragma omp barrier
}

double exact_rows(const float *dy, const float *x, float *dw, float *db, long m, long n, long k, long t) {
    long rows = least(ROWS, n - t * ROWS);
    const float *from = dy + t * ROWS;
    double total = dw ? rows_of(rows, (Left){from, 1, n}, x, k, m, (Forward){0, IDENTITY, 0}, (Gate){IDENTITY, 0}, dw, k, k) : 0;
    if (db) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < m; i++) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first16(rows), from + i * n));
        _mm512_mask_storeu_ps(db, first16(rows), sum);
        total += _mm512_reduce_add_ps(_mm512_mul_ps(sum, sum));
    }
    return total;
}
