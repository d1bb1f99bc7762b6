/* Products of bfloat16 matrices with float32 sums: the one loop that everything here is built on.

   C (32 x 32, float32, rows `width` apart) = A (32 x K) B (K x 32), K a multiple of 32.

   A lies by rows, K after K. B lies in panels of 16 columns: K/2 rows of 16 pairs (b[k][n], b[k+1][n]), which is the order
   in which the processor's dot products of pairs read it. Whatever is shorter than its multiple of 32 is filled with zeros.

   A float32 number is the sum of three bfloat16 numbers, a = a0 + a1 + a2, each 2^-8 of the one before. With three parts of
   both sides, the six products a_p b_q with p + q < 3 give what float32 products would (Henry, Tang & Heinecke 2019,
   arXiv 1904.06376); with two, three products give 16 bits of the 24; with one part it is a product of bfloat16 numbers.

   Two forms of the same sums: with the tile registers (AMX: 8 tiles of 16 rows of 64 bytes, 16 x 16 x 32 products an
   instruction; Intel's architecture instruction set extensions, chapter 3), and with AVX-512's dot product of pairs. */

#ifndef TILES_H
#define TILES_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define SIDE 32 /* of a block of C */
#define HALF 16 /* float32 numbers in a register; columns of a panel */
#define COARSE 1 /* parts of a number: bfloat16 products */
#define FINE 2   /* 16 bits */
#define FULL 3   /* what float32 gives */

static inline long up(long n) { return (n + SIDE - 1) / SIDE * SIDE; }
static inline long least(long a, long b) { return a < b ? a : b; }

/* Numbers below 1e-38 are read and written as zero: the processor takes a hundred times as long for each of them, and the
   moments of pixels that are hardly ever lit decay to such numbers. Of the calling thread; begin gives what end restores. */
static inline unsigned begin_flushing(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
static inline void end_flushing(unsigned before) { _mm_setcsr(before); }

/* the first n of 16 lanes, none where n < 0 */
static inline __mmask16 first16(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

static inline __mmask16 above0(__m512 x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ); }

/* 16 pairs from two rows of 16 numbers: lane n is (a[n], b[n]) */
static inline __m512i pairs(__m512 a, __m512 b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

/* 32 numbers in a row, as bfloat16 */
static inline __m512i narrow(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

/* What is left of x when its bfloat16 part is taken away, exactly. */
static inline __m512 rest(__m512 x) {
    __m512i part = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
    return _mm512_sub_ps(x, (__m512)part);
}

/* a 16 x 16 square of 32-bit lanes, rows for columns; in registers, if its loops are unrolled early */
static inline __attribute__((always_inline)) void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* 32 rows of A, `row` numbers apart; a panel of B and another `next` numbers on. Each further part is `part`
   numbers on. B may have fewer parts than A, and A only one (`part` is 0), where they hold numbers of eight bits (pixels that
   are 0 or 1). */
typedef struct {
    const bf16 *first;
    long row, part;
} Rows;
typedef struct {
    const bf16 *first;
    long next, part, parts;
} Panels;

#ifdef __AMX_BF16__

/* Each thread says in which shape it uses its tiles: all have 16 rows of 64 bytes. In static memory, since gcc does not
   know that the instruction reads all of it, and leaves out what is written there. */
static inline void begin_tiles(void) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
}
static inline void end_tiles(void) { _tile_release(); }

/* Nor does gcc know what the loads and stores of tiles read and write. */
#define SETTLE __asm__ volatile("" ::: "memory")

/* While another program uses the same core too, tile instructions that follow each other closely take four times as long as alone,
   and two and a half times with eight instructions after each that do nothing (`docs/decisions.md`). Else they cost nothing: there
   is room for a hundred beside a product. */
#define ROOM __asm__ volatile("nop\nnop\nnop\nnop\nnop\nnop\nnop\nnop")

/* A block of sums in four tiles: from zero, += 32 rows of A and 32 columns of B of depth 32, to its place. `one` and `two` are the
   first of 16 rows each, `left` and `right` of 16 rows of pairs; steps are bytes from row to row. */
static inline void begin_block(void) {
    SETTLE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
static inline void add_to_block(const void *one, const void *two, long step, const void *left, const void *right, long next) {
    _tile_loadd(4, one, step);
    ROOM;
    _tile_loadd(5, two, step);
    ROOM;
    _tile_loadd(6, left, next);
    ROOM;
    _tile_loadd(7, right, next);
    ROOM;
    _tile_dpbf16ps(0, 4, 6);
    ROOM;
    _tile_dpbf16ps(1, 4, 7);
    ROOM;
    _tile_dpbf16ps(2, 5, 6);
    ROOM;
    _tile_dpbf16ps(3, 5, 7);
    ROOM;
}
static inline void end_block(float *c, long width) {
    _tile_stored(0, c, width * 4);
    _tile_stored(1, c + 16, width * 4);
    _tile_stored(2, c + 16 * width, width * 4);
    _tile_stored(3, c + 16 * width + 16, width * 4);
    SETTLE;
}

static inline void block(Rows a, Panels b, long k, int parts, float *c, long width) {
    begin_block();
    for (int size = parts - 1; size >= 0; size--) /* the smallest products first */
        for (int p = size < b.parts ? 0 : size - (int)b.parts + 1; p <= (a.part ? size : 0); p++) {
            const bf16 *rows = a.first + p * a.part, *left = b.first + (size - p) * b.part, *right = left + b.next;
            for (long i = 0; i < k; i += 32)
                add_to_block(rows + i, rows + 16 * a.row + i, a.row * 2, left + i * HALF, right + i * HALF, 64);
        }
    end_block(c, width);
}

#else

static inline void begin_tiles(void) {}
static inline void end_tiles(void) {}

static inline void block(Rows a, Panels b, long k, int parts, float *c, long width) {
    for (int m = 0; m < SIDE; m += 8) {
        __m512 sum[8][2];
        for (int r = 0; r < 8; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (int size = parts - 1; size >= 0; size--)
            for (int p = size < b.parts ? 0 : size - (int)b.parts + 1; p <= (a.part ? size : 0); p++) {
                const bf16 *rows = a.first + p * a.part + m * a.row, *left = b.first + (size - p) * b.part;
                const bf16 *right = left + b.next;
                for (long i = 0; i < k; i += 2) {
                    __m512bh l = (__m512bh)_mm512_loadu_si512(left + i * HALF);
                    __m512bh h = (__m512bh)_mm512_loadu_si512(right + i * HALF);
                    for (int r = 0; r < 8; r++) {
                        int both;
                        memcpy(&both, rows + r * a.row + i, 4);
                        __m512bh one = (__m512bh)_mm512_set1_epi32(both);
                        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], one, l);
                        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], one, h);
                    }
                }
            }
        for (int r = 0; r < 8; r++)
            for (int h = 0; h < 2; h++) _mm512_storeu_ps(c + (m + r) * width + h * HALF, sum[r][h]);
    }
}

#endif
#endif
