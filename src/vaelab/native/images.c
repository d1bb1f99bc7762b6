#include "images.h"

#include "linear.h"

/* Row i of the batch is to be made soon, and lies anywhere in the data set. */
static inline void fetch(Source from, long i, long m, long n) {
    for (long j = 0; i < m && j < n; j += 64) __builtin_prefetch(from.bytes + from.index[i] * n + j);
}

/* 8 words of SplitMix64 from their counters. */
static inline __m512i mixed(__m512i z) {
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64((long long)0xbf58476d1ce4e5b9));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64((long long)0x94d049bb133111eb));
    return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
}

/* 255 where byte * 257 - 2^15 is above a signed 16-bit number, the draws from one of a number on; four of them are a word. */
static void draw(const uint8_t *row, uint64_t seed, long number, long n, uint8_t *to) {
    const uint64_t golden = 0x9e3779b97f4a7c15, word = (uint64_t)number / 4;
    const __m512i step = _mm512_set1_epi64((long long)(8 * golden)), one = _mm512_set1_epi64((long long)golden);
    const __m512i first = _mm512_mullo_epi64(_mm512_set_epi64(8, 7, 6, 5, 4, 3, 2, 1), one);
    int16_t lanes[32];
    for (int h = 0; h < 32; h++) lanes[h] = (int16_t)(h + number % 4);
    const __m512i from = _mm512_loadu_si512(lanes);
    __m512i counter = _mm512_add_epi64(first, _mm512_set1_epi64((long long)(seed + word * golden))), next = mixed(counter);
    for (long j = 0; j < n; j += 32) {
        __mmask32 inside = (__mmask32)first16(n - j - 16) << 16 | first16(n - j);
        __m512i now = next;
        counter = _mm512_add_epi64(counter, step);
        next = mixed(counter);
        __m512i pixel = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(inside, row + j));
        pixel = _mm512_add_epi16(_mm512_mullo_epi16(pixel, _mm512_set1_epi16(257)), _mm512_set1_epi16(-32768));
        __mmask32 lit = _mm512_cmplt_epi16_mask(_mm512_permutex2var_epi16(now, from, next), pixel);
        _mm256_mask_storeu_epi8(to + j, inside, _mm256_maskz_set1_epi8(lit, -1));
    }
}

/* Some pixels of row i of the batch, from j on: number i n + j of the draws belongs to pixel j. */
static void some_of(Source from, long i, long n, long j, long count, uint8_t *to) {
    const uint8_t *row = from.bytes + from.index[i] * n + j;
    if (from.kind == DRAWN) {
        draw(row, from.seed, i * n + j, count, to);
        return;
    }
    for (long q = 0; q < count; q += 64) {
        __mmask64 inside = count - q >= 64 ? ~0ull : (1ull << (count - q)) - 1;
        __m512i bytes = _mm512_maskz_loadu_epi8(inside, row + q);
        if (from.kind == HALVED) bytes = _mm512_movm_epi8(_mm512_movepi8_mask(bytes));
        _mm512_mask_storeu_epi8(to + q, inside, bytes);
    }
}

static void levels(const uint8_t *bytes, long n, float *to) {
    for (long j = 0; j < n; j += 16)
        _mm512_mask_storeu_ps(to + j, first16(n - j), level16(_mm_maskz_loadu_epi8(first16(n - j), bytes + j)));
}

/* A batch (rows, n) in float32. */
void batch(const uint8_t *bytes, const long *index, long kind, uint64_t seed, float *out, long rows, long n, int threads) {
    const Source from = {bytes, index, kind, seed};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        uint8_t piece[1024];
        fetch(from, i + 1, rows, n);
        for (long j = 0; j < n; j += (long)sizeof piece) {
            long count = least((long)sizeof piece, n - j);
            some_of(from, i, n, j, count, piece);
            levels(piece, count, out + i * n + j);
        }
    }
}

/* Rows i and i + 8 of 16 rows of 16 bytes, each two laid into one another. Four times, and columns are rows: each byte's place,
   eight bits, has gone round by half. */
static inline __attribute__((always_inline)) void interleave(const __m128i a[16], __m128i b[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
}

/* 16 pixels of 16 images, from pixel j and row i of the batch on, whose bytes are in `rows`. Returns the sum of the squares of what
   products see. */
static inline double square_of(const uint8_t *rows, long i, long j, long m, long n, Taken to) {
    __m128i image[16], pixel[16];
    __m512 squares = _mm512_setzero_ps();
    __mmask16 images = first16(m - i), pixels = first16(n - j);
#pragma GCC unroll 16
    for (int h = 0; h < 16; h++) pixel[h] = _mm_loadu_si128((const __m128i *)(rows + h * up(n)));
    interleave(pixel, image);
    interleave(image, pixel);
    interleave(pixel, image);
    interleave(image, pixel);
    if (to.across)
        for (long q = 0; q < least(16, n - j); q++)
            for (long s = 0; s < to.k; s++) _mm_mask_storeu_epi8(to.across + (j + q) * to.width + s * m + i, images, pixel[q]);
    if (!to.columns) return 0;
    for (long q = 0; q < 16; q += 2) {
        __m512 one = level16(pixel[q]), two = level16(pixel[q + 1]);
        if (to.minus) {
            one = _mm512_sub_ps(one, _mm512_set1_ps(j + q < n ? to.minus[j + q] : 0));
            two = _mm512_sub_ps(two, _mm512_set1_ps(j + q + 1 < n ? to.minus[j + q + 1] : 0));
        }
        one = _mm512_maskz_mov_ps(images, one);
        two = _mm512_maskz_mov_ps(images, two);
        squares = _mm512_fmadd_ps(one, one, _mm512_fmadd_ps(two, two, squares));
        _mm512_storeu_si512(to.columns + i * up(n) + (j + q) * HALF, pairs(one, two));
    }
    if (to.inputs) {
        __m512 minus = to.minus ? _mm512_maskz_loadu_ps(pixels, to.minus + j) : _mm512_setzero_ps();
        for (long h = 0; h < 16; h += 2) {
            __m512 one = level16(_mm_loadu_si128((const __m128i *)(rows + h * up(n))));
            __m512 two = level16(_mm_loadu_si128((const __m128i *)(rows + (h + 1) * up(n))));
            one = _mm512_maskz_sub_ps(i + h < m ? pixels : 0, one, minus);
            two = _mm512_maskz_sub_ps(i + h + 1 < m ? pixels : 0, two, minus);
            _mm512_storeu_si512(to.inputs + j / HALF * apart(m) + (i + h) * HALF, pairs(one, two));
        }
    }
    return _mm512_reduce_add_ps(squares);
}

void take_shared(Source from, long m, long n, Taken to, double *size, bf16 *alone) {
    uint8_t *rows = (uint8_t *)alone;
    double sum = 0;
    memset(rows, 0, 16 * up(n));
#pragma omp for schedule(static) nowait
    for (long i = 0; i < up(m); i += 16) {
        if (i + 16 > m) memset(rows, 0, 16 * up(n));
        for (long h = 0; h < least(16, m - i); h++) {
            some_of(from, i + h, n, 0, n, rows + h * up(n));
            if (to.x) levels(rows + h * up(n), n, to.x + (i + h) * n);
        }
        for (long j = 0; j < up(n) && (to.across || to.columns); j += 16) {
            if (j < 256) fetch(from, i + 16 + j / 16, m, n);
            sum += square_of(rows + j, i, j, m, n, to);
        }
    }
#pragma omp atomic
    *size += sum;
#pragma omp barrier
}
