/* Bytes of a data set to a batch of float32 images: the rows `index` of (all, n) bytes.

   GREY   byte / 255, rounded as a division is: q = b r with r the float32 nearest to 1 / 255, and what it leaves, b - 255 q
   BITS   1 where (byte * 257 - 2^15) is above a signed 16-bit number, which is drawn here: `vaelab.data.protocol` says how */

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

/* 8 words of SplitMix64 from their counters. */
static inline __m512i mixed(__m512i z) {
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64((long long)0xbf58476d1ce4e5b9));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64((long long)0x94d049bb133111eb));
    return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
}

/* Number i n + j of the draws belongs to pixel j of row i; four of them are a word. */
void bits(const uint8_t *bytes, const long *index, uint64_t seed, float *out, long rows, long n, int threads) {
    const uint64_t golden = 0x9e3779b97f4a7c15;
    const __m512i spread = _mm512_set1_epi16(257), middle = _mm512_set1_epi16(-32768);
    const __m512i step = _mm512_set1_epi64((long long)(8 * golden)), one = _mm512_set1_epi64((long long)golden);
    const __m512i first = _mm512_mullo_epi64(_mm512_set_epi64(8, 7, 6, 5, 4, 3, 2, 1), one);
    int16_t lanes[32];
    for (int i = 0; i < 32; i++) lanes[i] = (int16_t)i;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const uint8_t *row = bytes + index[i] * n;
        const uint64_t word = (uint64_t)(i * n) / 4;
        const __m512i from = _mm512_add_epi16(_mm512_loadu_si512(lanes), _mm512_set1_epi16((short)(i * n % 4)));
        __m512i counter = _mm512_add_epi64(first, _mm512_set1_epi64((long long)(seed + word * golden))), next = mixed(counter);
        fetch(bytes, index, i + 1, rows, n);
        for (long j = 0; j < n; j += 32) {
            __mmask16 low = first16(n - j), high = first16(n - j - 16);
            __m512i now = next;
            counter = _mm512_add_epi64(counter, step);
            next = mixed(counter);
            __m512i pixel = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((__mmask32)high << 16 | low, row + j));
            pixel = _mm512_add_epi16(_mm512_mullo_epi16(pixel, spread), middle);
            __mmask32 lit = _mm512_cmplt_epi16_mask(_mm512_permutex2var_epi16(now, from, next), pixel);
            float *to = out + i * n + j;
            _mm512_mask_storeu_ps(to, low, _mm512_maskz_mov_ps((__mmask16)lit, _mm512_set1_ps(1.0f)));
            _mm512_mask_storeu_ps(to + 16, high, _mm512_maskz_mov_ps((__mmask16)(lit >> 16), _mm512_set1_ps(1.0f)));
        }
    }
}
