/* Bytes of a data set to a batch of float32 images: the rows `index` of (all, n) bytes.

   GREY   byte / 255, rounded as a division is: q = b r with r the float32 nearest to 1 / 255, and what it leaves, b - 255 q
   BITS   1 where (byte * 257 - 2^15) is above a signed 16-bit number, drawn or fixed: `vaelab.data.protocol` */

#include "tiles.h"

void grey(const uint8_t *bytes, const long *index, float *out, long rows, long n, int threads) {
    const float reciprocal = 1.0f / 255;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const uint8_t *row = bytes + index[i] * n;
        if (i + 1 < rows) /* the next image lies anywhere */
            for (long j = 0; j < n; j += 64) __builtin_prefetch(bytes + index[i + 1] * n + j);
        for (long j = 0; j < n; j++) {
            float b = row[j], q = b * reciprocal;
            out[i * n + j] = fmaf(fmaf(-255.0f, q, b), reciprocal, q);
        }
    }
}

void bits(const uint8_t *bytes, const long *index, const int16_t *noise, float *out, long rows, long n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const uint8_t *row = bytes + index[i] * n;
        if (i + 1 < rows)
            for (long j = 0; j < n; j += 64) __builtin_prefetch(bytes + index[i + 1] * n + j);
        for (long j = 0; j < n; j++) out[i * n + j] = noise[i * n + j] < (int16_t)(row[j] * 257 - 32768) ? 1.0f : 0.0f;
    }
}
