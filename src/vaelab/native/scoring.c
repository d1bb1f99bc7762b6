/* Many codes against one image of Bernoulli pixels: a decoder's last linear layers, and log p(x) of what they say, which is
   never stored. The rows of a block of sums are a layer's outputs and its columns codes: two rows are a row of pairs of the
   next layer's B, and at the end each lane adds up a code of its own. 32 codes go through all layers near the processor.

       log p(x) = sum x l - max(l, 0)  -  log of the product of 1 + e^-|l|

   The product is kept as m 2^e, 1 <= m < 2, and one logarithm is taken of it at the end. */

#include "functions.h"
#include "rows.h"

/* w (n, k) as the rows of A that `score_codes` reads: (up(n), up(k)). */
void pack_rows(const float *w, bf16 *rows, long n, long k) {
    for (long i = 0; i < up(n); i++) as_row(w, n, k, i, rows, COARSE, 0);
}

enum { RELU, SILU };

static inline __m512 activated(__m512 l, int kind) {
    const __m512 zero = _mm512_setzero_ps();
    if (kind == RELU) return _mm512_max_ps(zero, l); /* l where it is not a number */
    __m512 most = _mm512_set1_ps(80); /* l / (1 + e^-l), beyond it 0, where the reciprocal is that of a finite number */
    __m512 below = _mm512_add_ps(_mm512_set1_ps(1), exp16(_mm512_min_ps(_mm512_sub_ps(zero, l), most)));
    __m512 inverse = _mm512_rcp14_ps(below);
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(2)));
    return _mm512_mul_ps(l, inverse);
}

/* 32 rows of sums from row j of a layer's outputs, for 32 codes, as rows of the next layer's B. */
static inline void as_inputs(const float *sums, const float *bias, int kind, long depth, long j, bf16 *out) {
    for (int h = 0; h < 2; h++)
        for (int p = 0; p < SIDE; p += 2) {
            const float *row = sums + p * SIDE + h * HALF;
            __m512 a = activated(_mm512_add_ps(_mm512_load_ps(row), _mm512_set1_ps(bias[p])), kind);
            __m512 b = activated(_mm512_add_ps(_mm512_load_ps(row + SIDE), _mm512_set1_ps(bias[p + 1])), kind);
            _mm512_storeu_si512(out + h * HALF * depth + (j + p) * HALF, pairs(a, b));
        }
}

typedef struct {
    __m512 linear, product, doublings;
} Codes;

/* Adds `pixels` rows of a block of sums, from the column of the first of 16 codes. */
static inline void add_block(Codes *s, const float *sums, const float *bias, const float *x, long pixels) {
    const __m512 zero = _mm512_setzero_ps();
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

/* `layers` linear layers of widths[0] inputs and widths[l + 1] outputs, packed one after the other, their biases filled up to
   multiples of 32; kinds[l]: the activation after each but the last. x (m, widths[0]) is what the first reads for each code;
   image (widths[layers]), log_p (m). Scratch: 64 up(the largest width but the last) bfloat16 numbers a thread. */
void score_codes(const bf16 *weights, const float *biases, const long *widths, const int *kinds, long layers,
                 const float *image, const float *x, float *log_p, long m, bf16 *scratch, int threads) {
    long most = 0, k = widths[0];
    for (long l = 0; l < layers; l++) most = up(widths[l]) > most ? up(widths[l]) : most;
#pragma omp parallel num_threads(threads)
    {
        float sums[SIDE * SIDE] __attribute__((aligned(64)));
        begin_tiles();
#pragma omp for schedule(static)
        for (long t = 0; t < threads; t++) {
            bf16 *in = scratch + 2 * t * SIDE * most, *out = in + SIDE * most;
            long strip = up((m + threads - 1) / threads), end = least(m, (t + 1) * strip);
            for (long i = t * strip; i < end; i += SIDE) {
                const bf16 *rows = weights;
                const float *bias = biases;
                for (int h = 0; h < 2; h++)
                    panel(x + (i + h * HALF) * k, m - i - h * HALF, k, in + h * HALF * up(k), COARSE, 0);
                for (long l = 0; l < layers - 1; l++) {
                    long depth = up(widths[l]), n = up(widths[l + 1]);
                    for (long j = 0; j < n; j += SIDE, rows += SIDE * depth, bias += SIDE) {
                        block((Rows){rows, depth, 0}, (Panels){in, HALF * depth, 0, 1}, depth, COARSE, sums, SIDE);
                        if (kinds[l] == RELU) as_inputs(sums, bias, RELU, n, j, out);
                        else as_inputs(sums, bias, SILU, n, j, out);
                    }
                    bf16 *free = in;
                    in = out;
                    out = free;
                }
                Codes s[2];
                for (int h = 0; h < 2; h++) {
                    s[h].linear = s[h].doublings = _mm512_setzero_ps();
                    s[h].product = _mm512_set1_ps(1.0f);
                }
                long depth = up(widths[layers - 1]), n = widths[layers];
                for (long j = 0; j < n; j += SIDE, rows += SIDE * depth) {
                    block((Rows){rows, depth, 0}, (Panels){in, HALF * depth, 0, 1}, depth, COARSE, sums, SIDE);
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
