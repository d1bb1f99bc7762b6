/* One pass of the most used composition, forward and backward, without leaving native code.

   q(z|x) is a diagonal Gaussian, p(z) a standard normal, p(x|z) has Bernoulli pixels, encoder and decoder are chains of the
   operations below, and what is differentiated is the mean over images of distortion + beta rate (`vaelab.objectives.ELBO`).
   `step.py` makes the chains from a model's modules. All else is done by autograd, with the same results. */

#include <omp.h>

#include "adam.h"
#include "codes.h"
#include "convolution.h"
#include "exact.h"
#include "linear.h"
#include "pixels.h"

enum { LINEAR, EXACT, DOWN, UP, ADD, SUBTRACT, WAVES };

/* Weights or biases, their gradient, and Adam's moments of them, and their multiple of its learning rate. */
typedef struct {
    float *at, *gradient, *mean, *square;
    float multiple;
} Parameter;

/* (rows, inputs) to value (rows, outputs), and on the way back `gradient`, of the value.
   LINEAR, EXACT   w (outputs, inputs), b (outputs) or null, products of bfloat16 or float32 numbers; LINEAR has room for what is
                   kept
   DOWN, UP        convolutions and transposed ones of `shape`, whose images are the rows
                   After all four comes an activation, and the slopes of SiLU are kept; where dw or db is not null it is set, and
                   the sums of the squares of their parts
   ADD, SUBTRACT   w (outputs): a constant
   WAVES           x, and beside it sqrt(2) sin(x w + b): w (inputs, outputs - inputs) and b are constants
   turns has room for three of each thread's: of the value, of the gradient of x, and of the weights.
   size and slope are the sums of the squares of x, and of the gradient of the value, or more: of a row at a time in float32, then
   in double, so that they are not less either by what long sums lose. */
typedef struct {
    long kind, inputs, outputs, activation;
    Parameter w, b;
    float *value, *slopes, *gradient;
    double *squares, size, slope;
    Kept kept;
    Shape shape;
    Turns *turns;
} Operation;

/* A pass: its operations, and what it fills: codes, log_px (k, images), sums of rate, of distortion and of the squares of the
   gradient, whose parts are `blocks`; scratch of all threads, and `each` numbers of each.

   Images are taken from `source`. A first operation that is LINEAR reads them as they are taken, less `taken.minus`, where
   `taken.columns` is room for that; pixels are scored as a last one gives their logits, where `pixels.rows` is room for what that
   leaves. `taken.x` has room where anything else reads images. */
typedef struct {
    Operation *encoder, *decoder;
    long encoders, decoders;
    Codes codes;
    float *log_px;
    double *sums, *squares;
    long blocks;
    bf16 *scratch, *alone;
    long each;
    Source source;
    long pixels_of_image;
    Taken taken;
    Pixels pixels;
} Plan;

static int convolves(const Operation *o) { return o->kind == DOWN || o->kind == UP; }
static long step_of(const Operation *o) { return o->kind == EXACT ? ROWS : SIDE; } /* rows of its weights that are one piece */
static int learns(const Operation *o) { return o->w.gradient || o->b.gradient; } /* and is no constant */
static Shape of_images(const Operation *o, long images) {
    Shape shape = o->shape;
    shape.images = images;
    return shape;
}

static void elementwise(const Operation *o, const float *x, long m) {
    long n = o->outputs;
#pragma omp for schedule(static)
    for (long i = 0; i < m; i++)
        for (long j = 0; j < n; j += 16) {
            __mmask16 inside = first16(n - j);
            __m512 v = _mm512_maskz_loadu_ps(inside, x + i * n + j);
            if (o->kind == SUBTRACT) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(inside, o->w.at + j));
            if (o->kind == ADD) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(inside, o->w.at + j));
            _mm512_mask_storeu_ps(o->value + i * n + j, inside, v);
        }
}

/* The argument of wave j to j + 15 of row i. */
static inline __m512 phase(const Operation *o, const float *x, long i, long j, __mmask16 inside) {
    __m512 sum = _mm512_maskz_loadu_ps(inside, o->b.at + j);
    for (long d = 0; d < o->inputs; d++)
        sum = _mm512_fmadd_ps(_mm512_set1_ps(x[i * o->inputs + d]),
                              _mm512_maskz_loadu_ps(inside, o->w.at + d * (o->outputs - o->inputs) + j), sum);
    return sum;
}

static void waves(const Operation *o, const float *x, long m) {
    long k = o->inputs, count = o->outputs - k;
#pragma omp for schedule(static)
    for (long i = 0; i < m; i++) {
        float *to = o->value + i * o->outputs;
        for (long d = 0; d < k; d++) to[d] = x[i * k + d];
        for (long j = 0; j < count; j += 16) {
            __m512 sine, cosine;
            sincos16(phase(o, x, i, j, first16(count - j)), &sine, &cosine);
            _mm512_mask_storeu_ps(to + k + j, first16(count - j), _mm512_mul_ps(_mm512_set1_ps((float)M_SQRT2), sine));
        }
    }
}

static void waves_backward(const Operation *o, const float *x, const float *dy, float *dx, long m, double *size) {
    long k = o->inputs, count = o->outputs - k;
    double squares = 0;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < m; i++) {
        const float *from = dy + i * o->outputs;
        for (long d = 0; d < k; d++) dx[i * k + d] = from[d];
        for (long j = 0; j < count; j += 16) {
            __mmask16 inside = first16(count - j);
            __m512 sine, cosine;
            sincos16(phase(o, x, i, j, inside), &sine, &cosine);
            __m512 slope = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps((float)M_SQRT2), cosine),
                                         _mm512_maskz_loadu_ps(inside, from + k + j));
            for (long d = 0; d < k; d++)
                dx[i * k + d] += _mm512_reduce_add_ps(_mm512_mul_ps(slope, _mm512_maskz_loadu_ps(inside, o->w.at + d * count + j)));
        }
        for (long d = 0; d < k; d++) squares += (double)dx[i * k + d] * dx[i * k + d];
    }
    if (size) {
#pragma omp atomic
        *size += squares;
    }
#pragma omp barrier
}

/* The sum of the squares of x (rows, n), which no product has read in passing; added in any order. */
static void measure(const float *x, long rows, long n, double *size) {
    double sum = 0;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < rows; i++) {
        __m512 squares = _mm512_setzero_ps();
        for (long j = 0; j < n; j += 16) {
            __m512 v = _mm512_maskz_loadu_ps(first16(n - j), x + i * n + j);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        sum += _mm512_reduce_add_ps(squares);
    }
#pragma omp atomic
    *size += sum;
}

/* Whether an operation reads images as they are taken, and scores pixels as it gives them. */
static int takes(const Operation *o, const Plan *p) { return o == p->encoder && p->taken.columns; }
static int scores(const Operation *o, const Plan *p) { return o == p->decoder + p->decoders - 1 && p->pixels.rows; }

static const float *forward(Operation *o, long count, const float *x, long m, const Plan *p, bf16 *alone) {
    for (; count--; x = o++->value) {
        Forward then = {o->b.at, o->activation, o->slopes};
        Shape shape = of_images(o, m);
        const Pixels *pixels = scores(o, p) ? &p->pixels : 0;
        if (o->kind == LINEAR) {
            if (!takes(o, p)) linear_read_shared(x, m, o->inputs, p->scratch, o->kept.inputs, &o->size);
            linear_forward_shared(p->scratch, o->w.at, then, pixels, o->value, pixels ? &o->slope : 0, m, o->outputs, o->inputs,
                                  o->kept.weights, alone, o->turns);
        } else if (o->kind == EXACT)
            exact_forward_shared(x, o->w.at, then, o->value, m, o->outputs, o->inputs, (float *)alone, o->turns);
        else if (convolves(o))
            convolution_shared(&shape, o->kind == UP, x, o->w.at, then, (Gate){IDENTITY, 0}, o->value, &o->size, 0, p->scratch,
                               alone);
        else if (o->kind == WAVES)
            waves(o, x, m);
        else
            elementwise(o, x, m);
        if (o->kind == EXACT) measure(x, m, o->inputs, &o->size);
    }
    return x;
}

/* From the gradient of the last value to those of all others, and to that of x where dx is not null. */
static void backward(Operation *first, long count, const float *x, float *dx, long m, const Plan *p, bf16 *alone) {
    for (Operation *o = first + count - 1; o >= first; o--) {
        const float *input = o == first ? x : o[-1].value;
        float *to = o == first ? dx : o[-1].gradient;
        double *slope = o == first ? 0 : &o[-1].slope;
        Gate gate = {o == first ? IDENTITY : o[-1].activation, 0};
        if (gate.activation != IDENTITY) gate.from = gate.activation == SILU ? o[-1].slopes : input;
        Shape shape = of_images(o, m);
        if (!to) return;
        if (o->kind == LINEAR) {
            const bf16 *rows = scores(o, p) ? p->pixels.rows : p->scratch;
            if (!scores(o, p)) linear_turn_shared(o->gradient, m, o->outputs, p->scratch);
            linear_input_shared(rows, o->kept.weights, gate, to, m, o->outputs, o->inputs, slope,
                                turns_after(o->turns, 1));
        } else if (o->kind == EXACT)
            exact_input_shared(o->gradient, o->w.at, gate, to, m, o->outputs, o->inputs, slope, turns_after(o->turns, 1));
        else if (convolves(o))
            convolution_shared(&shape, o->kind == DOWN, o->gradient, o->w.at, (Forward){0, IDENTITY, 0}, gate, to, 0, slope,
                               p->scratch, alone);
        else if (o->kind == WAVES)
            waves_backward(o, input, o->gradient, to, m, slope);
        else { /* in its place */
#pragma omp single
            if (slope) *slope = o->slope;
        }
    }
}

/* The gradients of a convolution's weights and biases, and their update where Adam is given. */
static void kernels(const Operation *o, const float *x, long m, const Adam *adam, const Plan *p, bf16 *alone) {
    Shape s = of_images(o, m);
    int back = o->kind == UP;
    long row = s.c * s.kh * s.kw, channels = back ? s.c : s.n;
    if (o->w.gradient)
        convolution_weights_shared(&s, back ? o->gradient : x, back ? x : o->gradient, o->w.gradient, 0, o->squares, p->scratch,
                                   alone);
    if (o->b.gradient)
        convolution_bias_shared(o->gradient, o->b.gradient, 0, o->squares + s.n, m, channels, o->outputs / channels);
    if (!adam) return;
    const Parameter *w = &o->w, *b = &o->b;
#pragma omp for schedule(static) nowait
    for (long at = 0; at < s.n * row; at += row)
        if (w->gradient) adam_run(adam, w->multiple, w->gradient + at, w->at + at, w->mean + at, w->square + at, row);
#pragma omp single nowait
    if (b->gradient) adam_run(adam, b->multiple, b->gradient, b->at, b->mean, b->square, channels);
}

/* Some numbers to their place; returns the sum of their squares. */
static double copy(const float *from, float *to, long n) {
    double squares = 0;
    for (long i = 0; i < n; i++) {
        to[i] = from[i];
        squares += (double)from[i] * from[i];
    }
    return squares;
}

/* The gradients of weights and biases, some rows at a time, or, where Adam is given, their update: then a gradient stays near the
   core, and 3 numbers a weight are read and written instead of 5. */
static void some_parameters(Operation *o, long t, const float *x, long m, const Adam *adam, const Plan *p, bf16 *alone) {
    float *own = (float *)(alone + SIDE * up(m)), own_b[SIDE];
    long k = o->inputs, n = o->outputs, step = step_of(o), at = t * step, rows = least(step, n - at);
    const Parameter *w = &o->w, *b = &o->b;
    float *dw = !w->gradient ? 0 : adam ? own : w->gradient + at * k;
    float *db = !b->gradient ? 0 : adam ? own_b : b->gradient + at;
    const bf16 *across = scores(o, p) ? p->pixels.across + at * up(m) : alone;
    if (o->kind == EXACT)
        o->squares[t] = exact_rows(o->gradient, x, dw, db, m, n, k, t);
    else {
        if (dw && !scores(o, p)) linear_across(o->gradient, m, n, t, alone);
        o->squares[t] = dw ? linear_rows(across, o->kept.inputs, dw, m, n, k, t, 0) : 0;
        if (db) o->squares[t] += scores(o, p) ? copy(p->pixels.sums + at, db, rows) : linear_bias(o->gradient, db, m, n, t, 0);
    }
    if (adam && dw) adam_run(adam, w->multiple, dw, w->at + at * k, w->mean + at * k, w->square + at * k, rows * k);
    if (adam && db) adam_run(adam, b->multiple, db, b->at + at, b->mean + at, b->square + at, rows);
}

/* Those of all operations: first each thread its own, then what others have left. */
static void parameters(const Plan *p, const float *x, long images, long k, const Adam *adam, bf16 *alone) {
    begin_tiles();
    for (int others = 0; others < 2; others++)
        for (long i = p->encoders + p->decoders - 1; i >= 0; i--) {
            int codes = i >= p->encoders;
            Operation *first = codes ? p->decoder : p->encoder, *o = first + (codes ? i - p->encoders : i);
            const float *input = o > first ? o[-1].value : codes ? p->codes.at : x;
            long m = codes ? k * images : images;
            if (!learns(o)) continue;
            if (convolves(o)) {
                if (!others) kernels(o, input, m, adam, p, alone);
                begin_tiles();
                continue;
            }
            Turns *turns = turns_after(o->turns, 2);
            for (long t; (t = others ? next_piece(turns) : own_piece(turns)) >= 0;)
                some_parameters(o, t, input, m, adam, p, alone);
        }
    end_tiles();
}

/* The update of n weights, or biases, whose gradient is known. */
static void run_all(const Parameter *q, long n, const Adam *adam) {
    if (q->gradient)
#pragma omp for schedule(static) nowait
        for (long i = 0; i < n; i += RUN)
            adam_run(adam, q->multiple, q->gradient + i, q->at + i, q->mean + i, q->square + i, least(RUN, n - i));
}

/* That of all operations of a chain. */
static void update(const Operation *o, long count, const Adam *adam) {
    for (; count--; o++) {
        const Shape *s = &o->shape;
        run_all(&o->w, convolves(o) ? s->n * s->c * s->kh * s->kw : o->outputs * o->inputs, adam);
        run_all(&o->b, !convolves(o) ? o->outputs : o->kind == UP ? s->c : s->n, adam);
    }
}

/* The square of the gradient's norm, added up in the same order whoever asks. */
static double square_of_norm(const Plan *p) {
    double total = 0;
    for (long i = 0; i < p->blocks; i++) total += p->squares[i];
    return total;
}

/* No less than the square of the gradient's norm: that of a layer's is at most the product of those of dy and x, and 2 % more for
   what is rounded to bfloat16 on the way, and for sums taken in any order. A convolution reads a number once for each window that
   it is in, and a bias is one number for all positions. Where nobody has measured a gradient it may be any. */
static double bound(const Operation *o, long count, long m) {
    double total = 0;
    for (; count--; o++)
        if (learns(o)) {
            const Shape *s = &o->shape;
            double windows = 1, positions = 1;
            if (convolves(o)) {
                windows = (double)((s->kh + s->sh - 1) / s->sh) * (double)((s->kw + s->sw - 1) / s->sw);
                positions = o->kind == UP ? s->h * s->w : s->p * s->q;
            }
            total += o->slope > 0 ? 1.02 * o->slope * (windows * o->size + positions * m) : INFINITY;
        }
    return total;
}

/* Of an operation on m rows, before the threads begin. */
static void begin(Operation *o, long m, int threads) {
    long pieces = (m + ROWS - 1) / ROWS;
    o->size = o->slope = 0;
    deal(o->turns, o->kind == EXACT ? pieces : up(o->outputs) / SIDE, threads);
    deal(turns_after(o->turns, 1), o->kind == EXACT ? pieces : up(o->inputs) / SIDE, threads);
    deal(turns_after(o->turns, 2), (o->outputs + step_of(o) - 1) / step_of(o), threads);
}

/* One step: images `index` of the source, noise (k, images, dim). Fills what the plan names, and sets the gradients. Where Adam is
   given, and value and gradient are finite, it updates the weights, too: in passing, without leaving gradients, where their norm is
   surely no larger than `most`, and returns 2; else once it is known, as if it were no larger than `clip`, if that is not 0, and
   returns 1. */
static int elbo_step(Plan *p, const long *index, uint64_t seed, const float *noise, long images, float beta, const Adam *adam,
                     double most, double clip, int threads) {
    Operation *last = p->encoder + p->encoders - 1, *pixel = p->decoder + p->decoders - 1;
    const float *x = p->taken.x;
    long k = p->taken.k;
    int passing = 0, after = 0;
    Adam later;
    for (Operation *o = p->encoder; o <= last; o++) begin(o, images, threads);
    for (Operation *o = p->decoder; o <= pixel; o++) begin(o, k * images, threads);
    p->source.index = index;
    p->source.seed = seed;
    p->pixels.scale = -1.0f / (float)(k * images);
#pragma omp parallel num_threads(threads)
    {
        unsigned control = begin_flushing();
        bf16 *alone = p->alone + omp_get_thread_num() * p->each;
        take_shared(p->source, images, p->pixels_of_image, p->taken, &p->encoder->size, alone);
        const float *moments = forward(p->encoder, p->encoders, x, images, p, alone);
        draw(&p->codes, moments, noise, images, k);
        const float *logits = forward(p->decoder, p->decoders, p->codes.at, k * images, p, alone);
        if (p->pixels.rows)
            scores_shared(&p->pixels, p->log_px, k * images, pixel->outputs);
        else
            bernoulli_shared(logits, x, p->log_px, pixel->gradient, p->pixels.scale, &pixel->slope, k * images, images,
                             pixel->outputs);
        backward(p->decoder, p->decoders, p->codes.at, p->codes.gradient, k * images, p, alone);
        draw_backward(&p->codes, moments, noise, beta / (float)images, images, k, last->gradient, &last->slope);
        backward(p->encoder, p->encoders, x, 0, images, p, alone);
#pragma omp single
        {
            p->sums[0] = p->sums[1] = p->sums[2] = 0;
            for (long i = 0; i < images; i++) p->sums[0] += p->codes.rate[i];
            for (long i = 0; i < k * images; i++) p->sums[1] -= p->log_px[i] / (double)k;
            double square = bound(p->encoder, p->encoders, images) + bound(p->decoder, p->decoders, k * images);
            after = adam && isfinite(p->sums[1] + beta * p->sums[0]);
            passing = after && square <= most * most;
        }
        parameters(p, x, images, k, passing ? adam : 0, alone);
        if (after && !passing) {
#pragma omp barrier
#pragma omp single
            {
                double norm = sqrt(square_of_norm(p));
                after = isfinite(norm);
                later = *adam;
                if (0 < clip && clip < norm) later.scale = (float)(clip / norm);
            }
            if (after) {
                update(p->encoder, p->encoders, &later);
                update(p->decoder, p->decoders, &later);
            }
        }
        end_flushing(control);
    }
    p->sums[2] = square_of_norm(p);
    return after + passing;
}

/* Steps one after the other, of `batch` images each and fewer in the last, with the constants of each, until one is not finite, since
   what follows that is not known here, or for so many seconds. Fills (steps, 4): sums as in the plan, and whether the
   weights were updated, as above. Returns how many there were. */
long elbo_steps(Plan *p, long steps, const long *index, long images, long batch, const uint64_t *seeds, const float *noise,
                const float *beta, const Adam *adam, double most, double clip, double *told, double seconds, int threads) {
    const long numbers = p->taken.k * batch * p->codes.dim; /* of the noise of a step */
    const double end = omp_get_wtime() + seconds;
    for (long s = 0; s < steps; s++, told += 4) {
        p->sums = told;
        int updated = elbo_step(p, index + s * batch, seeds[s], noise + s * numbers, least(batch, images - s * batch), beta[s],
                                adam ? adam + s : 0, most, clip, threads);
        told[3] = updated;
        if (!updated || omp_get_wtime() > end) return s + 1;
    }
    return steps;
}
