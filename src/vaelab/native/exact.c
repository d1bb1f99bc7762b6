/* Products of float32 numbers, with AVX-512's sums of products: a block of 8 rows and 48 columns of c is held in registers. Such
   layers have few inputs or outputs, and take as long in this way as to convert for the tiles what they read. */

#include "exact.h"
#include "tiles.h"

/* The numbers of A: row r, step i of the sum is at r * row + i * step. */
typedef struct {
    const float *first;
    long row, step;
} Left;

/* What becomes of the sums: start (columns) or null is added, what is below `floor` becomes that, and what is not above 0 in
   `gate`, of the shape of c, or null, is 0. */
typedef struct {
    const float *start, *gate;
    float floor;
} Then;

/* c (rows, columns) = A B and then, with B (depth, columns), c and B of so many numbers a row. Returns the sum of the squares.
   Loops must be unrolled early, or the compiler keeps the sums in memory. */
static inline __attribute__((always_inline)) __m512 block_of(const int rows, const int vectors, Left a, const float *b, long width,
                                                              long depth, Then then, float *c, long other, long columns) {
    __m512 sum[8][3], squares = _mm512_setzero_ps();
    __mmask16 inside[3];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
        inside[v] = first16(columns - v * 16);
        sum[0][v] = then.start ? _mm512_maskz_loadu_ps(inside[v], then.start + v * 16) : _mm512_setzero_ps();
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
            __m512 value = _mm512_max_ps(_mm512_set1_ps(then.floor), sum[r][v]);
            if (then.gate)
                value = _mm512_maskz_mov_ps(above0(_mm512_maskz_loadu_ps(inside[v], then.gate + r * other + v * 16)), value);
            squares = _mm512_fmadd_ps(value, value, squares);
            _mm512_mask_storeu_ps(c + r * other + v * 16, inside[v], value);
        }
    return squares;
}

/* The same for any number of rows up to 8, and of columns. */
static double rows_of(long rows, Left a, const float *b, long width, long depth, Then then, float *c, long other,
                      long columns) {
    __m512 squares = _mm512_setzero_ps();
    for (long j = 0; j < columns; j += 48) {
        long left = columns - j;
        for (long r = 0; r < rows; r += rows == ROWS ? ROWS : 1) {
            Left at = {a.first + r * a.row, a.row, a.step};
            Then here = {then.start ? then.start + j : 0, then.gate ? then.gate + r * other + j : 0, then.floor};
#define BLOCK(rows, vectors) block_of(rows, vectors, at, b + j, width, depth, here, c + r * other + j, other, left)
            squares = _mm512_add_ps(squares, rows == ROWS ? left > 32   ? BLOCK(ROWS, 3)
                                                            : left > 16 ? BLOCK(ROWS, 2)
                                                                        : BLOCK(ROWS, 1)
                                                          : BLOCK(1, 3));
        }
    }
    return _mm512_reduce_add_ps(squares);
}

/* w (n, k) by columns: out (k, up(n)), zeros where there is nothing. */
static void by_columns(const float *w, long n, long k, float *out) {
    for (long j = 0; j < up(n); j += 16)
        for (long i = 0; i < k; i += 16) {
            __m512i r[16];
            for (long h = 0; h < 16; h++)
                r[h] = (__m512i)_mm512_maskz_loadu_ps(j + h < n ? first16(k - i) : 0, w + (j + h) * k + i);
            transpose(r);
            for (long h = 0; h < least(16, k - i); h++) _mm512_storeu_si512(out + (i + h) * up(n) + j, r[h]);
        }
}

void exact_forward_shared(const float *x, const float *w, const float *b, float *y, long m, long n, long k, float floor,
                          float *alone) {
    by_columns(w, n, k, alone);
#pragma omp for schedule(static)
    for (long i = 0; i < m; i += ROWS)
        rows_of(least(ROWS, m - i), (Left){x + i * k, k, 1}, alone, up(n), k, (Then){b, 0, floor}, y + i * n, n, n);
}

void exact_input_shared(const float *dy, const float *w, const float *gate, float *dx, long m, long n, long k,
                        double *size) {
    double squares = 0;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m; i += ROWS)
        squares += rows_of(least(ROWS, m - i), (Left){dy + i * n, n, 1}, w, k, n,
                           (Then){0, gate ? gate + i * k : 0, -INFINITY}, dx + i * k, k, k);
    if (size) {
#pragma omp atomic
        *size += squares;
    }
#pragma omp barrier
}

double exact_rows(const float *dy, const float *x, float *dw, float *db, long m, long n, long k, long t) {
    long rows = least(ROWS, n - t * ROWS);
    const float *from = dy + t * ROWS;
    double total = dw ? rows_of(rows, (Left){from, 1, n}, x, k, m, (Then){0, 0, -INFINITY}, dw, k, k) : 0;
    if (db) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < m; i++) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first16(rows), from + i * n));
        _mm512_mask_storeu_ps(db, first16(rows), sum);
        total += _mm512_reduce_add_ps(_mm512_mul_ps(sum, sum));
    }
    return total;
}
