/* Images of a data set, which are bytes, on their way into a pass: what the model sees of a byte is a 255th of it. */

#ifndef IMAGES_H
#define IMAGES_H

#include "tiles.h"

/* What becomes of a byte first, `vaelab.data.protocol` says what for. */
enum { AS_IT_IS, DRAWN, HALVED };

/* The rows `index` of (all, n) bytes; `seed` is that of bits which are drawn. */
typedef struct {
    const uint8_t *bytes;
    const long *index;
    long kind;
    uint64_t seed;
} Source;

/* What is made of m images of n pixels, each null or room for it.
   x         (m, n), float32
   across    (n, k m): the bytes of pixel j of all images, k times, and rows `width` apart
   columns   less `minus`, which is null or (n), as columns of B, K = up(n)
   inputs    the same as pairs of B, K = m, see `linear.h` */
typedef struct {
    float *x;
    uint8_t *across;
    long k, width;
    const float *minus;
    bf16 *columns, *inputs;
} Taken;

/* All threads of a parallel region call it together. `alone` is each thread's own, 8 up(n) numbers. Adds the sum of the squares of
   what products see to *size, in any order. */
void take_shared(Source from, long m, long n, Taken to, double *size, bf16 *alone);

/* byte / 255, rounded as a division is: q = b r with r the float32 nearest to 1 / 255, and what it leaves, b - 255 q. */
static inline __m512 level16(__m128i bytes) {
    const __m512 reciprocal = _mm512_set1_ps(1.0f / 255), whole = _mm512_set1_ps(255.0f);
    __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), q = _mm512_mul_ps(b, reciprocal);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(whole, q, b), reciprocal, q);
}

#endif
