/* What each of many codes says of each of many images of binary pixels, added up over groups of codes: the inner loop of
   quadrature (`vaelab.quadrature`), where a group is the nodes of a tile.

       log p(x|z) = sum x l - sum log(1 + e^l),  share = log of the sum over a group of e^(log p(x|z) + weight of z)

   x is exact in bfloat16, and l in three parts: the products are those of float32 numbers. log p(x|z) is not stored: each
   group of codes leaves two numbers for an image. */

#include <float.h>

#include "functions.h"
#include "rows.h"

/* images (all, k) of numbers that bfloat16 holds: rows (all, up(k)). */
void pack_images(const float *images, bf16 *rows, long all, long k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < all; i++) as_row(images, all, k, i, rows, COARSE, 0);
}

/* 16 chosen rows of depth numbers, zeros where there are fewer, as a panel of B. */
static inline void as_panel(const bf16 *rows, const long *index, long count, long depth, bf16 *out) {
    for (long j = 0; j < depth; j += 32) {
        __m512i r[16];
        for (long i = 0; i < HALF; i++)
            r[i] = i < count ? _mm512_loadu_si512(rows + index[i] * depth + j) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < HALF; i++) _mm512_storeu_si512(out + j * HALF + i * 32, r[i]);
    }
}

typedef struct {
    __m512 top, total;
} Group;

/* One column of 16 images: the sums of the codes of a group, which are written over. */
static inline Group add_up(float *sums, const float *of_zeros, const float *weight, long group, __m512 *highest) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (long r = 0; r < group; r++) {
        __m512 log_px = _mm512_add_ps(_mm512_load_ps(sums + r * SIDE), _mm512_set1_ps(of_zeros[r]));
        __m512 joint = _mm512_add_ps(log_px, _mm512_set1_ps(weight[r]));
        *highest = _mm512_max_ps(*highest, log_px);
        top = _mm512_max_ps(top, joint);
        _mm512_store_ps(sums + r * SIDE, joint);
    }
    __m512 finite = _mm512_max_ps(top, _mm512_set1_ps(-FLT_MAX));
    for (long r = 0; r < group; r++)
        total = _mm512_add_ps(total, exp16(_mm512_sub_ps(_mm512_load_ps(sums + r * SIDE), finite)));
    return (Group){top, total};
}

/* logits (codes, k), with log p(0|z) and the weight of each code, (codes); the `chosen` images of index, of packed rows.
   Codes come in groups of `group`, a divisor of 32 or a multiple of it. top and total (codes / group, chosen): share =
   top + log(total); best (chosen): the largest log p(x|z). Scratch: (3 up(codes) + up(chosen)) up(k) bfloat16 numbers. */
void shares(const float *logits, const float *of_zeros, const float *weight, const bf16 *rows, const long *index, float *top,
            float *total, float *best, long codes, long chosen, long k, long group, bf16 *scratch, int threads) {
    long depth = up(k), together = group > SIDE ? group : SIDE, part = up(codes) * depth;
    bf16 *parts = scratch, *columns = scratch + FULL * part;
#pragma omp parallel num_threads(threads)
    {
        float sums[together * SIDE] __attribute__((aligned(64)));
        begin_tiles();
#pragma omp for schedule(static) nowait
        for (long i = 0; i < up(codes); i++) as_row(logits, codes, k, i, parts, FULL, part);
#pragma omp for schedule(static)
        for (long p = 0; p < up(chosen) / HALF; p++)
            as_panel(rows, index + p * HALF, chosen - p * HALF, depth, columns + p * HALF * depth);
        for (long t = 0; t < codes; t += together) {
#pragma omp for schedule(static) nowait
            for (long j = 0; j < up(chosen); j += SIDE) {
                for (long r = t; r < least(up(codes), t + together); r += SIDE)
                    block((Rows){parts + r * depth, depth, part}, (Panels){columns + j * depth, HALF * depth, 0, 1}, depth, FULL,
                          sums + (r - t) * SIDE, SIDE);
                for (long i = j; i < least(chosen, j + SIDE); i += HALF) {
                    __mmask16 inside = first16(chosen - i);
                    __m512 highest = t ? _mm512_maskz_loadu_ps(inside, best + i) : _mm512_set1_ps(-INFINITY);
                    for (long g = t; g < least(codes, t + together); g += group) {
                        long to = g / group * chosen + i;
                        Group one = add_up(sums + (g - t) * SIDE + i - j, of_zeros + g, weight + g, group, &highest);
                        _mm512_mask_storeu_ps(top + to, inside, one.top);
                        _mm512_mask_storeu_ps(total + to, inside, one.total);
                    }
                    _mm512_mask_storeu_ps(best + i, inside, highest);
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
