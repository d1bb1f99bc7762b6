/* Many codes against one image of Bernoulli pixels: a decoder's last linear layer, and log p(x) of what it says, which is
   never stored. The rows of a block of sums are pixels and its columns codes, so that each lane adds up a code of its own.

       log p(x) = sum x l - max(l, 0)  -  log of the product of 1 + e^-|l|

   The product is kept as m 2^e, 1 <= m < 2, and one logarithm is taken of it at the end. */

#include "functions.h"
#include "rows.h"

/* w (n, k) as the rows of A that `score_codes` reads: (up(n), up(k)). */
void pack_rows(const float *w, bf16 *rows, long n, long k) {
    for (long i = 0; i < up(n); i++) as_row(w, n, k, i, rows);
}

typedef struct {
    __m512 linear, product, doublings;
} Codes;

/* Adds `pixels` rows of a block of sums, from the column of the first of 16 codes. */
static inline void add_block(Codes *s, const float *sums, const float *bias, const float *x, long pixels) {
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    __m512 linear = zero, product = s->product;
    for (long p = 0; p < pixels; p++) {
        __m512 l = _mm512_add_ps(_mm512_load_ps(sums + p * SIDE), _mm512_set1_ps(bias[p]));
        __m512 e = exp16(_mm512_sub_ps(zero, _mm512_abs_ps(l)));
        product = _mm512_fmadd_ps(product, e, product);
        linear = _mm512_add_ps(linear, _mm512_fmsub_ps(_mm512_set1_ps(x[p]), l, _mm512_max_ps(l, zero)));
    }
    s->linear = _mm512_add_ps(s->linear, linear); /* block by block: one long sum would round 30 times as much away */
    s->doublings = _mm512_add_ps(s->doublings, _mm512_getexp_ps(product));
    s->product = _mm512_getmant_ps(product, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}

/* Row i of hidden (m, k) is what the layer of packed rows (n, k) and bias (n) reads for code i; image (n), log_p (m).
   Scratch: 32 up(k) bfloat16 numbers a thread. */
void score_codes(const bf16 *rows, const float *bias, const float *image, const float *hidden, float *log_p, long m, long n,
                 long k, bf16 *scratch, int threads) {
    long depth = up(k);
#pragma omp parallel num_threads(threads)
    {
        float sums[SIDE * SIDE] __attribute__((aligned(64)));
        begin_tiles();
#pragma omp for schedule(static)
        for (long t = 0; t < threads; t++) {
            bf16 *columns = scratch + t * SIDE * depth;
            long strip = up((m + threads - 1) / threads), end = least(m, (t + 1) * strip);
            for (long i = t * strip; i < end; i += SIDE) {
                Codes s[2];
                for (int h = 0; h < 2; h++) {
                    as_columns(hidden + i * k, m - i, k, h, columns);
                    s[h].linear = s[h].doublings = _mm512_setzero_ps();
                    s[h].product = _mm512_set1_ps(1.0f);
                }
                for (long j = 0; j < n; j += SIDE) {
                    block(rows + j * depth, depth, columns, columns + HALF * depth, depth, sums);
                    for (int h = 0; h < 2; h++) add_block(s + h, sums + h * HALF, bias + j, image + j, least(SIDE, n - j));
                }
                for (int h = 0; h < 2; h++) {
                    float linear[HALF], product[HALF], doublings[HALF];
                    _mm512_storeu_ps(linear, s[h].linear);
                    _mm512_storeu_ps(product, s[h].product);
                    _mm512_storeu_ps(doublings, s[h].doublings);
                    for (long c = 0; c < least(HALF, m - i - h * HALF); c++)
                        log_p[i + h * HALF + c] = (float)(linear[c] - (M_LN2 * doublings[c] + log(product[c])));
                }
            }
        }
        end_tiles();
    }
}
