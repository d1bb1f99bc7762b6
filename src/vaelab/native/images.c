/* Bytes of a data set to a batch of float32 images: the rows `index` of (all, n) bytes.

   GREY   byte / 255, rounded as a division is: q = b r with r the float32 nearest to 1 / 255, and what it leaves, b - 255 q
   BITS   1 where (byte * 257 - 2^15) is above a signed 16-bit number, drawn or fixed: `vaelab.data.protocol` */

#include "tiles.h"

/* Row i of the batch is to be made soon, and lies anywhere in the data set. */
static inline void fetch(const uint8_t *bytes, const long *index, long i, long rows, long n) {
    for (long j = 0; i < rows && j < n; j += 64) __builtin_prefetch(bytes + index[i] * n + j);
}

void grey(const uint8_t *bytes, const long *index, float *out, long rows, long n, int threads) {
    const __m512 reciprocal = _mm512_set1_ps(1.0f / 255), whole = _mm512_set1_ps(255.0f);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const uint8_t *row = bytes + index[i] * n;
        fetch(bytes, index, i + 1, rows, n);
        for (long j = 0; j < n; j += 16) {
            __mmask16 inside = first16(n - j);
            __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, row + j)));
            __m512 q = _mm512_mul_ps(b, reciprocal);
            _mm512_mask_storeu_ps(out + i * n + j, inside, _mm512_fmadd_ps(_mm512_fnmadd_ps(whole, q, b), reciprocal, q));
        }
    }
}

void bits(const uint8_t *bytes, const long *index, const int16_t *noise, float *out, long rows, long n, int threads) {
    const __m256i spread = _mm256_set1_epi16(257), middle = _mm256_set1_epi16(-32768);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const uint8_t *row = bytes + index[i] * n;
        fetch(bytes, index, i + 1, rows, n);
        for (long j = 0; j < n; j += 16) {
            __mmask16 inside = first16(n - j);
            __m256i pixel = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(inside, row + j));
            pixel = _mm256_add_epi16(_mm256_mullo_epi16(pixel, spread), middle);
            __mmask16 lit = _mm256_cmplt_epi16_mask(_mm256_maskz_loadu_epi16(inside, noise + i * n + j), pixel);
            _mm512_mask_storeu_ps(out + i * n + j, inside, _mm512_maskz_mov_ps(lit, _mm512_set1_ps(1.0f)));
        }
    }
}
