/* Products of float32 numbers, with AVX-512's sums of products: a block of 8 rows and 48 columns of c is held in registers. Such
   layers have few inputs or outputs, and take as long in this way as to convert for the tiles what they read. */

#include "exact.h"
#include "tiles.h"

/* The numbers of A: row r, step i of the sum is at r * row + i * step. */
typedef struct {
    const float *first;
    long row, step;
} Left;

/* c (rows, columns) = A B + start, with B (depth, columns), c and B of so many numbers a row; start (columns) or null. Returns the
   sum of the squares of c. */
static inline __attribute__((always_inline)) __m512 block_of(const int rows, const int vectors, Left a, const float *b, long width,
                                                              long depth, const float *start, float *c, long other, long columns) {
    __m512 sum[8][3], squares = _mm512_setzero_ps();
    __mmask16 inside[3];
    for (int v = 0; v < vectors; v++) {
        inside[v] = first16(columns - v * 16);
        sum[0][v] = start ? _mm512_maskz_loadu_ps(inside[v], start + v * 16) : _mm512_setzero_ps();
        for (int r = 1; r < rows; r++) sum[r][v] = sum[0][v];
    }
    for (long i = 0; i < depth; i++) {
        __m512 right[3];
        for (int v = 0; v < vectors; v++) right[v] = _mm512_maskz_loadu_ps(inside[v], b + i * width + v * 16);
        for (int r = 0; r < rows; r++) {
            __m512 left = _mm512_set1_ps(a.first[r * a.row + i * a.step]);
            for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_fmadd_ps(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            squares = _mm512_fmadd_ps(sum[r][v], sum[r][v], squares);
            _mm512_mask_storeu_ps(c + r * other + v * 16, inside[v], sum[r][v]);
        }
    return squares;
}

/* The same for any number of rows up to 8, and of columns. */
static double rows_of(long rows, Left a, const float *b, long width, long depth, const float *start, float *c, long other,
                      long columns) {
    __m512 squares = _mm512_setzero_ps();
    for (long j = 0; j < columns; j += 48) {
        long left = columns - j;
        const float *from = start ? start + j : 0;
        for (long r = 0; r < rows; r += rows == ROWS ? ROWS : 1) {
            Left at = {a.first + r * a.row, a.row, a.step};
#define BLOCK(rows, vectors) block_of(rows, vectors, at, b + j, width, depth, from, c + r * other + j, other, left)
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

void exact_forward_shared(const float *x, const float *w, const float *b, float *y, long m, long n, long k, float *alone) {
    by_columns(w, n, k, alone);
#pragma omp for schedule(static)
    for (long i = 0; i < m; i += ROWS)
        rows_of(least(ROWS, m - i), (Left){x + i * k, k, 1}, alone, up(n), k, b, y + i * n, n, n);
}

void exact_input_shared(const float *dy, const float *w, float *dx, long m, long n, long k, double *size) {
    double squares = 0;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m; i += ROWS)
        squares += rows_of(least(ROWS, m - i), (Left){dy + i * n, n, 1}, w, k, n, 0, dx + i * k, k, k);
    if (size) {
#pragma omp atomic
        *size += squares;
    }
#pragma omp barrier
}

double exact_rows(const float *dy, const float *x, float *dw, float *db, long m, long n, long k, long t) {
    long rows = least(ROWS, n - t * ROWS);
    const float *from = dy + t * ROWS;
    double total = dw ? rows_of(rows, (Left){from, 1, n}, x, k, m, 0, dw, k, k) : 0;
    if (db) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < m; i++) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first16(rows), from + i * n));
        _mm512_mask_storeu_ps(db, first16(rows), sum);
        total += _mm512_reduce_add_ps(_mm512_mul_ps(sum, sum));
    }
    return total;
}
