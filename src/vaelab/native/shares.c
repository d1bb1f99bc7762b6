/* What each of many codes says of each of many images of binary pixels, added up over groups of codes: the inner loop of
   quadrature (`vaelab.quadrature`), where a group is the nodes of a tile.

       log p(x|z) = sum x l - sum log(1 + e^l),  share = log of the sum over a group of e^(log p(x|z) + weight of z)

   x is exact in bfloat16, and l in three parts: the products are those of float32 numbers. Nothing of it is stored: each group of
   codes leaves two numbers for an image, and what the decoder says stays near the processor. */

#include <float.h>
#include <omp.h>

#include "decode.h"

/* images (all, k) of numbers that bfloat16 holds: rows (all, up(k)). */
void pack_images(const float *images, bf16 *rows, long all, long k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < all; i++) as_row(images, all, k, i, rows, COARSE, 0);
}

/* One image and a group of codes: `sums` are x l. */
static inline void add_up(const float *sums, const float *of_zeros, const float *weight, long group, float *top, float *total,
                          float *best) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    __m512 highest = none, most = none, sum = _mm512_setzero_ps();
    for (long c = 0; c < group; c += HALF) {
        __mmask16 inside = first16(group - c);
        __m512 one = _mm512_mask_add_ps(none, inside, _mm512_maskz_loadu_ps(inside, sums + c), _mm512_maskz_loadu_ps(inside, of_zeros + c));
        highest = _mm512_max_ps(highest, one);
        most = _mm512_max_ps(most, _mm512_add_ps(one, _mm512_maskz_loadu_ps(inside, weight + c)));
    }
    *top = _mm512_reduce_max_ps(most);
    __m512 finite = _mm512_set1_ps(*top > -FLT_MAX ? *top : -FLT_MAX);
    for (long c = 0; c < group; c += HALF) {
        __mmask16 inside = first16(group - c);
        __m512 one = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, sums + c), _mm512_maskz_loadu_ps(inside, of_zeros + c));
        __m512 joint = _mm512_add_ps(one, _mm512_maskz_loadu_ps(inside, weight + c));
        sum = _mm512_mask_add_ps(sum, inside, sum, exp16(_mm512_sub_ps(joint, finite)));
    }
    *total = _mm512_reduce_add_ps(sum);
    float found = _mm512_reduce_max_ps(highest);
    if (found > *best) *best = found;
}

/* The last layer of `codes` of them, a multiple of 32, as panels of B, and log p(0|z) of each. */
static void logits_of(const Decoder *d, int parts, long codes, const bf16 *in, bf16 *logits, float *of_zeros, float *sums) {
    long k = d->widths[1], depth = up(k);
    Codes s[codes / HALF];
    for (long c = 0; c < codes / HALF; c++) s[c] = no_pixels();
    for (long j = 0; j < depth; j += SIDE)
        for (long t = 0; t < codes; t += SIDE) {
            outputs(d, parts, codes, in, j, t, sums);
            for (int h = 0; h < 2; h++) add_block(s + t / HALF + h, sums + h * HALF, d->biases + j, 0, least(SIDE, k - j));
            as_inputs(sums, d->biases + j, NONE, parts, codes * depth, depth, j, logits + t * depth);
        }
    for (long c = 0; c < codes / HALF; c++) log_px(s + c, HALF, of_zeros + c * HALF);
}

/* A decoder as in `decode.h`, of two parts or three, and what its first layer reads, x (codes, widths[0]); of no layers where x is
   logits (codes, k) and of_zeros log p(0|z). With the weight of each code (codes), and the `chosen` images of index, of packed rows.
   Codes come in groups of `group`, a divisor of 32 or a multiple of it. top and total (codes / group, chosen): share = top +
   log(total); best (threads, chosen), at first minus infinity: the largest log p(x|z) that each has seen.

   Each thread takes `chunk` codes at a time, a multiple of 32 and of the group. Scratch: up(chosen) up(k) bfloat16 numbers, and for
   each thread chunk (6 up(the largest width but the last) + 3 up(k) + 66). */
void shares(const bf16 *weights, const float *biases, const long *widths, const int *kinds, long layers, int parts,
            const float *x, const float *of_zeros, const float *weight, const bf16 *rows, const long *index, float *top, float *total, float *best,
            long codes, long chosen, long k, long group, long chunk, bf16 *scratch, int threads) {
    long depth = up(k), most = 0, inputs = layers ? widths[0] : k;
    for (long l = 0; l < layers; l++) most = up(widths[l]) > most ? up(widths[l]) : most;
    bf16 *images = scratch, *own = images + up(chosen) * depth;
#pragma omp parallel num_threads(threads)
    {
        long me = omp_get_thread_num();
        bf16 *in = own + me * chunk * (2 * FULL * most + FULL * depth + 2 * (SIDE + 1)), *out = in + FULL * chunk * most;
        bf16 *logits = out + FULL * chunk * most;
        float *sums = (float *)(logits + FULL * chunk * depth), *zeros = sums + SIDE * chunk;
        begin_tiles();
#pragma omp for schedule(static)
        for (long i = 0; i < up(chosen); i++)
            if (i < chosen) memcpy(images + i * depth, rows + index[i] * depth, depth * 2);
            else memset(images + i * depth, 0, depth * 2);
#pragma omp for schedule(static)
        for (long first = 0; first < codes; first += chunk) {
            long here = least(chunk, codes - first), all = up(here);
            bf16 *read = layers ? in : logits;
            for (long t = 0; t < all; t += HALF)
                panel(x + (first + t) * inputs, here - t, inputs, read + t * up(inputs), parts, all * up(inputs));
            if (layers) {
                Decoder d = {weights, biases, widths, kinds, layers};
                const bf16 *last = through(&d, parts, all, in, out, sums);
                logits_of(&d, parts, all, last, logits, zeros, sums);
            } else
                memcpy(zeros, of_zeros + first, here * 4);
            for (long i = 0; i < chosen; i += SIDE) {
                for (long t = 0; t < all; t += SIDE)
                    block((Rows){images + i * depth, depth, 0}, (Panels){logits + t * depth, HALF * depth, all * depth, parts},
                          depth, parts, sums + t, all);
                for (long r = 0; r < least(SIDE, chosen - i); r++)
                    for (long c = 0; c < here; c += group) {
                        long to = (first + c) / group * chosen + i + r;
                        add_up(sums + r * all + c, zeros + c, weight + first + c, group, top + to, total + to,
                               best + me * chosen + i + r);
                    }
            }
        }
        end_tiles();
    }
}

/* log of the sum of e^x over each row of x (rows, n): out (rows). */
void log_sums(const float *x, float *out, long rows, long n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const float *row = x + i * n;
        const __m512 none = _mm512_set1_ps(-INFINITY);
        __m512 lanes = none, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long j = 0; j < n; j += 16) lanes = _mm512_max_ps(lanes, _mm512_mask_loadu_ps(none, first16(n - j), row + j));
        float top = _mm512_reduce_max_ps(lanes);
        __m512 finite = _mm512_set1_ps(top > -FLT_MAX ? top : -FLT_MAX);
        for (long j = 0; j < n; j += 16) {
            __m512 e = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(first16(n - j), row + j), finite));
            sum[j / 16 % 2] = _mm512_mask_add_ps(sum[j / 16 % 2], first16(n - j), sum[j / 16 % 2], e);
        }
        out[i] = top == INFINITY ? top : top + logf(_mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])));
    }
}
