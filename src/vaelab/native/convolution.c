/* The products of convolutions, see `convolution.h`. What a place of 16 or 32 windows reads in 16 pairs of channels, or in 16
   channels, are rows of a tile, each as far from the next: tiles read the planes themselves. Where there are fewer channels, or
   no tiles, it is collected first. */

#include <omp.h>

#include "convolution.h"
#include "windows.h"

#ifdef __AMX_BF16__
#define TILES 1
#else
#define TILES 0
#endif

/* Where results go: a layer's output y, which they get to through `then` and `gate`. */
typedef struct {
    Forward then;
    Gate gate;
    float *y;
    __m512 squares; /* of what was written, summed */
} Target;

static inline __attribute__((always_inline)) void emit(Target *o, __m512 sum, __m512 start, long at, __mmask16 inside) {
    sum = activated(o->then.activation, _mm512_add_ps(start, sum), o->then.slopes + at, inside);
    sum = gated(o->gate.activation, sum, o->gate.from + at, inside);
    o->squares = _mm512_mask3_fmadd_ps(sum, sum, o->squares, inside);
    _mm512_mask_storeu_ps(o->y + at, inside, sum);
}

/* Up to 16 numbers of a row of the image: those `inside` of numbers from `column` on. They are the first ones of a row of windows
   from number `from` on, where cells are one number wide; where they are two, each other number is of their second place, and
   `half` says which half of them it is. */
typedef struct {
    long from, column;
    __mmask16 there, inside;
    int half;
} Piece;

/* Where the numbers of an image are among results: where its rows begin, the pieces of a row, room for a row; and, where each
   window is one number of the image, which of each 16 are. */
typedef struct {
    long *rows, pieces;
    Piece *piece;
    float *room;
    int *before;
    __mmask16 *some;
} Order;

static inline long room_order(const Windows *v) {
    return up(4 * v->rows + (long)sizeof(Piece) / 2 * (v->columns / 8 + 4) + 2 * v->columns + count(v) / 4 + 8);
}

static Order order_of(const Windows *v, bf16 *room) {
    Order o = {.rows = (long *)room};
    o.piece = (Piece *)(o.rows + v->rows);
    o.room = (float *)(o.piece + v->columns / 8 + 4);
    o.before = (int *)(o.room + v->columns);
    o.some = (__mmask16 *)(o.before + up(count(v)) / 16);
    which(v, o.some, o.before);
    for (long i = 0; i < v->rows; i++) {
        long place = (i + v->off_top) % v->cell_h, line = (i + v->off_top) / v->cell_h;
        o.rows[i] = place * v->cell_w * v->features * up(count(v)) + line * pitch(v);
    }
    if (v->cell_w != 2) /* where cells are wider, a row is put together first */
        for (long j = 0; j < v->columns; j += 16) {
            __mmask16 inside = first16(v->columns - j);
            o.piece[o.pieces++] = (Piece){j + (v->cell_w == 1 ? v->off_left : 0), j, inside, inside, 0};
        }
    else
        for (long j = 0, column = -v->off_left; j < v->across; j += 16)
            for (int half = 0; half < 2; half++, column += 16) {
                __mmask16 inside = first16(v->columns - column) & ~first16(-column);
                if (inside) o.piece[o.pieces++] = (Piece){j, column, first16(v->across - j), inside, half};
            }
    return o;
}

/* The image that results make, which lie by rows of up(count) windows; `at` is where it begins in y. Returns the sum of the squares
   of what was written. What the compiler cannot know not to be overwritten is held apart. */
static double finish(const Windows *v, const float *sums, const Order *order, const Target *target, long at) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const long length = up(count(v)), next = v->features * length, features = v->features, rows = v->rows, columns = v->columns;
    const long cell_w = v->cell_w, left = v->off_left;
    const int straight = v->cell_h == 1 && cell_w == 1 && v->across == columns && v->down == rows;
    const Order p = *order;
    Target o = *target;
    for (long f = 0; f < features; f++, sums += length) {
        const __m512 start = _mm512_set1_ps(o.then.start ? o.then.start[f] : 0.0f);
        if (straight) {
            for (long t = 0; 16 * t < length; t++) {
                __m512 sum = _mm512_maskz_compress_ps(p.some[t], _mm512_load_ps(sums + 16 * t));
                emit(&o, sum, start, at + p.before[t], first16(__builtin_popcount(p.some[t])));
            }
            at += rows * columns;
            continue;
        }
        for (long i = 0; i < rows; i++, at += columns) {
            const float *row = sums + p.rows[i];
            if (cell_w > 2) {
                for (long j = left; j < columns + left; j++) p.room[j - left] = row[j % cell_w * next + j / cell_w];
                row = p.room;
            }
            for (const Piece *piece = p.piece; piece < p.piece + p.pieces; piece++) {
                __m512 sum = _mm512_maskz_loadu_ps(piece->there, row + piece->from);
                if (cell_w == 2) {
                    __m512 other = _mm512_maskz_loadu_ps(piece->there, row + next + piece->from);
                    sum = _mm512_permutex2var_ps(sum, piece->half ? high : low, other);
                }
                emit(&o, sum, start, at + piece->column, piece->inside);
            }
        }
    }
    return _mm512_reduce_add_ps(o.squares);
}

/* K of down and up: two channels after two, of one place of a window after the other. */
static inline long depth(const Windows *v) { return up(2 * pairs_of(v) * taps(v)); }
static inline long results(const Windows *v) { return up(v->features * v->cell_h * v->cell_w); }

/* The weights of result r, in the order of K. */
static void weights_of(const Shape *s, const Windows *v, int upwards, const float *w, long r, float *row, bf16 *out) {
    long feature = r % v->features, place = r / v->features, i0 = place / v->cell_w, j0 = place % v->cell_w;
    long size = s->kh * s->kw, next = upwards ? s->c * size : size;
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)next));
    memset(row, 0, (size_t)depth(v) * sizeof(float));
    for (long i = 0; i < v->taps_h && place < v->cell_h * v->cell_w; i++)
        for (long j = 0; j < v->taps_w; j++) {
            long a = upwards ? i0 + (v->taps_h - 1 - i) * s->sh : i, b = upwards ? j0 + (v->taps_w - 1 - j) * s->sw : j;
            const float *from = w + (upwards ? feature * size : feature * s->c * size) + a * s->kw + b;
            float *to = row + 2 * pairs_of(v) * (i * v->taps_w + j);
            for (long c = 0; c < v->channels && a < s->kh && b < s->kw; c += 16) {
                __mmask16 inside = first16(v->channels - c);
                __m512 some = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, index, from + c * next, 4);
                _mm512_mask_storeu_ps(to + c, inside, some);
            }
        }
    for (long i = 0; i < depth(v); i += 32)
        _mm512_storeu_si512(out + i, narrow(_mm512_loadu_ps(row + i), _mm512_loadu_ps(row + i + 16)));
}

/* Where in the planes of pairs each two of K are, of window 0. */
static void begins(const Windows *v, int *at) {
    for (long i = 0; i < v->taps_h; i++)
        for (long j = 0; j < v->taps_w; j++)
            for (long c = 0; c < pairs_of(v); c++) *at++ = (int)(c * planes(v) + place_at(v, i, j));
}

/* 16 windows from t as a panel of B. */
static void collect(const Windows *v, const int *from, const int *at, long t, bf16 *out) {
    long n = pairs_of(v) * taps(v), k = depth(v) / 2;
    for (long i = 0; i < n; i++) _mm512_storeu_si512(out + i * 32, _mm512_loadu_si512(from + at[i] + t));
    for (long i = n; i < k; i++) _mm512_storeu_si512(out + i * 32, _mm512_setzero_si512());
}

/* 32 rows of A by 32 windows from t, the planes of whose pairs are `next` numbers apart. */
static inline void block_of_planes(const bf16 *rows, const int *from, const int *at, long next, long k, float *c, long width) {
#if TILES
    begin_block();
    for (long i = 0; i < k; i += 32) {
        const int *first = from + at[i / 2];
        add_to_block(rows + i, rows + 16 * k + i, k * 2, first, first + HALF, next * 4);
    }
    end_block(c, width);
#endif
}

/* Numbers of scratch, in bfloat16: what threads share, and what each has. */
static inline long room_shared(const Windows *v) { return (results(v) + 1) * depth(v); }
static inline long room_pairs(const Windows *v) { return 2 * up(pairs_of(v) * planes(v)); }
static inline long room_own(const Windows *v) {
    return room_pairs(v) + SIDE * depth(v) + 2 * results(v) * up(count(v)) + room_order(v);
}

void convolution_shared(const Shape *s, int upwards, const float *from, const float *w, Forward then, Gate gate, float *to,
                        double *read, double *written, bf16 *scratch, bf16 *alone) {
    const Windows v = upwards ? windows_up(s) : windows_down(s);
    long k = depth(&v), length = up(count(&v)), size = v.channels * v.height * v.width;
    bf16 *kernels = scratch, *left = alone + room_pairs(&v), *right = left + HALF * k;
    int *at = (int *)(kernels + results(&v) * k), *own = (int *)alone, itself = TILES && pairs_of(&v) % HALF == 0;
    float *sums = (float *)(right + HALF * k);
    const Order order = order_of(&v, (bf16 *)(sums + results(&v) * length));
    const Target target = {then, gate, to, _mm512_setzero_ps()};
    double squares = 0, others = 0;
#pragma omp for schedule(static) nowait
    for (long r = 0; r < results(&v); r++) weights_of(s, &v, upwards, w, r, (float *)left, kernels + r * k);
#pragma omp single
    begins(&v, at);
    memset(own, 0, (size_t)room_pairs(&v) * sizeof(bf16));
    begin_tiles();
#pragma omp for schedule(static) nowait
    for (long m = 0; m < s->images; m++) {
        squares += _mm512_reduce_add_ps(as_planes(&v, from + m * size, 1, own));
        for (long t = 0; t < count(&v); t += SIDE) {
            if (!itself) collect(&v, own, at, t, left), collect(&v, own, at, t + HALF, right);
            for (long r = 0; r < results(&v); r += SIDE) {
                if (itself)
                    block_of_planes(kernels + r * k, own + t, at, planes(&v), k, sums + r * length + t, length);
                else
                    block((Rows){kernels + r * k, k, 0}, (Panels){left, HALF * k, 0, 1}, k, COARSE, sums + r * length + t, length);
            }
        }
        others += finish(&v, sums, &order, &target, m * v.features * v.rows * v.columns);
    }
    end_tiles();
    if (read) {
#pragma omp atomic
        *read += squares;
    }
    if (written) {
#pragma omp atomic
        *written += others;
    }
#pragma omp barrier
}

/* The sum over images is taken in parts, by the shape alone, so that no number of threads changes it; each part reads a run of
   images at a time, whose windows make up K. */
#define PARTS 8
static inline long rows_of(const Windows *v) { return up(v->channels * taps(v)); } /* of all places, one after the other */
static inline long run(const Windows *v) {
    long wanted = 1024 / up(count(v));
    return wanted < 1 ? 1 : wanted;
}
static inline long row_length(const Windows *v) { return run(v) * up(count(v)) + SIDE; } /* not a power of two */
static inline long room_images(const Windows *v) { return up(run(v) * v->channels * planes(v)); }
static inline long room_weights(const Windows *v, long n) { return PARTS * 2 * rows_of(v) * n; }
static inline long room_part(const Windows *v, long n) {
    return room_images(v) + run(v) * up(count(v)) * n + SIDE * row_length(v) + up(count(v) / 4 + 8);
}

/* Rows of A: what a place reads of a channel, of each image's windows. */
static void collect_rows(const Windows *v, const bf16 *from, long first, long images, bf16 *out) {
    long windows = up(count(v)), each = v->channels * planes(v);
    for (long r = first; r < first + SIDE; r++, out += row_length(v)) {
        long place = r / v->channels, there = place < taps(v);
        const bf16 *row = from + (there ? r % v->channels * planes(v) + place_at(v, place / v->taps_w, place % v->taps_w) : 0);
        for (long m = 0; m < images; m++)
            for (long t = 0; t < windows; t += 32)
                _mm512_storeu_si512(out + m * windows + t, _mm512_loadu_si512(row + m * each + t));
    }
}

/* The same 32 rows, of which each 16 are `next` numbers apart, by 32 columns of panels. */
static inline void block_of_rows(const bf16 *one, const bf16 *two, long next, long each, long images, long windows,
                                 const bf16 *left, const bf16 *right, float *c) {
#if TILES
    begin_block();
    for (long m = 0; m < images; m++, one += each, two += each)
        for (long t = 0; t < windows; t += 32, left += 32 * HALF, right += 32 * HALF)
            add_to_block(one + t, two + t, next * 2, left, right, 64);
    end_block(c, SIDE);
#endif
}

void convolution_weights_shared(const Shape *s, const float *x, const float *y, float *dw, int add, double *squares,
                                bf16 *scratch, bf16 *alone) {
    const Windows v = windows_down(s);
    long k = rows_of(&v), n = up(s->n), windows = up(count(&v)), most = run(&v), parts = least(PARTS, s->images), each = v.channels * planes(&v);
    bf16 *own = alone, *panels = own + room_images(&v), *rows = panels + most * windows * n;
    int *before = (int *)(rows + SIDE * row_length(&v)), itself = TILES && v.channels % HALF == 0;
    __mmask16 *some = (__mmask16 *)(before + windows / 16);
    float *partial = (float *)scratch, sums[SIDE * SIDE] __attribute__((aligned(64)));
    which(&v, some, before);
    memset(own, 0, (size_t)room_images(&v) * sizeof(bf16));
    begin_tiles();
#pragma omp for schedule(static)
    for (long part = 0; part < parts; part++) {
        float *to = partial + part * k * n;
        long m = s->images * part / parts, end = s->images * (part + 1) / parts, images;
        for (int more = 0; m < end; m += images, more = 1) {
            images = least(most, end - m);
            for (long i = 0; i < images; i++) {
                as_planes(&v, x + (m + i) * s->c * s->h * s->w, 0, own + i * each);
                for (long j = 0; j < n; j += HALF)
                    as_windows(y + ((m + i) * s->n + j) * s->p * s->q, s->n - j, s->p * s->q, windows, some, before,
                               panels + (j * most + i * HALF) * windows);
            }
            for (long r = 0; r < k; r += SIDE) {
                long one = r / v.channels, two = least((r + HALF) / v.channels, taps(&v) - 1);
                const bf16 *first = own + r % v.channels * planes(&v) + place_at(&v, one / v.taps_w, one % v.taps_w);
                const bf16 *second = own + (r + HALF) % v.channels * planes(&v) + place_at(&v, two / v.taps_w, two % v.taps_w);
                if (!itself) collect_rows(&v, own, r, images, rows);
                for (long j = 0; j < n; j += SIDE) {
                    const bf16 *left = panels + j * most * windows, *right = left + HALF * most * windows;
                    if (itself)
                        block_of_rows(first, second, planes(&v), each, images, windows, left, right, sums);
                    else
                        block((Rows){rows, row_length(&v), 0}, (Panels){left, right - left, 0, 1}, images * windows, COARSE, sums,
                              SIDE);
                    put(sums, more, (Gate){IDENTITY, 0}, SIDE, n, 0, j, to + r * n);
                }
            }
        }
    }
    end_tiles();
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i rows_apart = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)(s->c * taps(&v))));
#pragma omp for schedule(static)
    for (long f = 0; f < s->n; f += 16) {
        __mmask16 inside = first16(s->n - f);
        __m512d low = _mm512_setzero_pd(), high = low;
        for (long place = 0; place < taps(&v); place++)
            for (long c = 0; c < s->c; c++) {
                float *to = dw + (f * s->c + c) * taps(&v) + place;
                __m512 sum = add ? _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, rows_apart, to, 4) : _mm512_setzero_ps();
                for (long part = 0; part < parts; part++)
                    sum = _mm512_add_ps(sum, _mm512_load_ps(partial + (part * k + place * s->c + c) * n + f));
                __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(sum)), b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1));
                low = _mm512_fmadd_pd(a, a, low), high = _mm512_fmadd_pd(b, b, high);
                _mm512_mask_i32scatter_ps(to, inside, rows_apart, sum, 4);
            }
        if (squares) {
            _mm512_mask_storeu_pd(squares + f, (__mmask8)inside, low);
            _mm512_mask_storeu_pd(squares + f + 8, (__mmask8)(inside >> 8), high);
        }
    }
}

void convolution_bias_shared(const float *x, float *db, int add, double *squares, long images, long channels, long size) {
#pragma omp for schedule(static)
    for (long c = 0; c < channels; c++) {
        double all = add ? db[c] : 0;
        for (long m = 0; m < images; m++) {
            const float *from = x + (m * channels + c) * size;
            __m512 sum = _mm512_setzero_ps();
            for (long j = 0; j < size; j += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first16(size - j), from + j));
            all += _mm512_reduce_add_ps(sum);
        }
        db[c] = (float)all;
        if (squares) squares[c] = (double)db[c] * db[c];
    }
}

void convolution_room(const Shape *s, long *rooms) {
    Windows down = windows_down(s), upwards = windows_up(s);
    long shared[3] = {room_shared(&down), room_shared(&upwards), room_weights(&down, up(s->n))};
    long each[3] = {room_own(&down), room_own(&upwards), room_part(&down, up(s->n))};
    rooms[0] = rooms[1] = 0;
    for (int i = 0; i < 3; i++) {
        if (shared[i] > rooms[0]) rooms[0] = shared[i];
        if (each[i] > rooms[1]) rooms[1] = each[i];
    }
}

/* The same, each in a parallel region of its own. b may be null; dw and db are added to. */
void convolution(const Shape *s, int upwards, const float *from, const float *w, const float *b, float *to, bf16 *scratch,
                 int threads) {
    long rooms[2];
    convolution_room(s, rooms);
#pragma omp parallel num_threads(threads)
    convolution_shared(s, upwards, from, w, (Forward){b, IDENTITY, 0}, (Gate){IDENTITY, 0}, to, 0, 0, scratch,
                       scratch + rooms[0] + omp_get_thread_num() * rooms[1]);
}

void convolution_weights(const float *x, const float *y, float *dw, const Shape *s, bf16 *scratch, int threads) {
    long rooms[2];
    convolution_room(s, rooms);
#pragma omp parallel num_threads(threads)
    convolution_weights_shared(s, x, y, dw, 1, 0, scratch, scratch + rooms[0] + omp_get_thread_num() * rooms[1]);
}

void convolution_bias(const float *x, float *db, long images, long channels, long size, int threads) {
#pragma omp parallel num_threads(threads)
    convolution_bias_shared(x, db, 1, 0, images, channels, size);
}
