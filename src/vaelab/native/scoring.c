/* Many codes against one image of Bernoulli pixels: a decoder's last linear layers, and log p(x) of what they say, which is
   never stored. 32 codes at a time, in bfloat16. */

#include "decode.h"

/* w (n, k) as the rows of A that a decoder's layers are: (parts, up(n), up(k)). */
void pack_rows(const float *w, bf16 *rows, long n, long k, int parts) {
    for (long i = 0; i < up(n); i++) as_row(w, n, k, i, rows, parts, up(n) * up(k));
}

/* A decoder as in `decode.h`. x (m, widths[0]) is what the first layer reads for each code; image (widths[layers]), log_p (m).
   Scratch: 64 up(the largest width but the last) bfloat16 numbers a thread. */
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
                for (int h = 0; h < 2; h++)
                    panel(x + (i + h * HALF) * k, m - i - h * HALF, k, in + h * HALF * up(k), COARSE, 0);
                Decoder d = {weights, biases, widths, kinds, layers};
                const bf16 *last = through(&d, COARSE, SIDE, in, out, sums);
                Codes s[2] = {no_pixels(), no_pixels()};
                for (long n = d.widths[1], j = 0; j < n; j += SIDE) {
                    outputs(&d, COARSE, SIDE, last, j, 0, sums);
                    for (int h = 0; h < 2; h++) add_block(s + h, sums + h * HALF, d.biases + j, image + j, least(SIDE, n - j));
                }
                for (int h = 0; h < 2; h++) log_px(s + h, m - i - h * HALF, log_p + i + h * HALF);
            }
        }
        end_tiles();
    }
}
