/* One pass of the most used composition, forward and backward, without leaving native code.

   q(z|x) is a diagonal Gaussian, p(z) a standard normal, p(x|z) has Bernoulli pixels, encoder and decoder are chains of the
   operations below, and what is differentiated is the mean over images of distortion + beta rate (`vaelab.objectives.ELBO`).
   `step.py` makes the chains from a model's modules. All else is done by autograd, with the same results. */

#include "functions.h"
#include "linear.h"
#include "pixels.h"

enum { LINEAR, EXACT, ADD, SUBTRACT, RELU, SILU, WAVES };

/* (rows, inputs) to value (rows, outputs).
   LINEAR, EXACT   w (outputs, inputs), b (outputs) or null, products in COARSE or FULL parts (FINE on the way back); dw and db
                   are set, or null, and the sums of their squares
   ADD, SUBTRACT   w (outputs): a constant
   WAVES           x, and beside it sqrt(2) sin(x w + b): w (inputs, outputs - inputs) and b are constants */
typedef struct {
    long kind, inputs, outputs;
    const float *w, *b;
    float *dw, *db, *value;
    double *squares;
} Operation;

/* What a pass fills: code (k, images, dim) and its gradient, log_px (k, images), rate (images), sums of rate and distortion;
   two rooms for the gradient of the widest operation; sums of squares of the gradients, `blocks` of them; scratch. */
typedef struct {
    Operation *encoder, *decoder;
    long encoders, decoders, dim;
    float *code, *code_gradient, *log_px, *rate, *gradient, *other;
    double *sums, *squares;
    long blocks;
    void *scratch;
} Plan;

static void elementwise(const Operation *o, const float *x, long m) {
    long n = o->outputs;
#pragma omp for schedule(static)
    for (long i = 0; i < m; i++)
        for (long j = 0; j < n; j += 16) {
            __mmask16 inside = first16(n - j);
            __m512 v = _mm512_maskz_loadu_ps(inside, x + i * n + j);
            if (o->kind == RELU) v = _mm512_max_ps(_mm512_setzero_ps(), v);
            if (o->kind == SILU) v = _mm512_mul_ps(v, sigmoid16(v));
            if (o->kind == SUBTRACT) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(inside, o->w + j));
            if (o->kind == ADD) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(inside, o->w + j));
            _mm512_mask_storeu_ps(o->value + i * n + j, inside, v);
        }
}

/* dy becomes dx, in its place */
static void elementwise_backward(const Operation *o, const float *x, float *dy, long m) {
    long n = o->outputs;
    if (o->kind == ADD || o->kind == SUBTRACT) return;
#pragma omp for schedule(static)
    for (long i = 0; i < m; i++)
        for (long j = 0; j < n; j += 16) {
            __mmask16 inside = first16(n - j);
            __m512 v = _mm512_maskz_loadu_ps(inside, x + i * n + j), slope = _mm512_set1_ps(1.0f);
            if (o->kind == RELU) slope = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ), slope);
            if (o->kind == SILU) { /* s + v s (1 - s) */
                __m512 s = sigmoid16(v);
                slope = _mm512_fmadd_ps(_mm512_mul_ps(v, s), _mm512_sub_ps(slope, s), s);
            }
            _mm512_mask_storeu_ps(dy + i * n + j, inside, _mm512_mul_ps(slope, _mm512_maskz_loadu_ps(inside, dy + i * n + j)));
        }
}

/* The argument of wave j to j + 15 of row i. */
static inline __m512 phase(const Operation *o, const float *x, long i, long j, __mmask16 inside) {
    __m512 sum = _mm512_maskz_loadu_ps(inside, o->b + j);
    for (long d = 0; d < o->inputs; d++)
        sum = _mm512_fmadd_ps(_mm512_set1_ps(x[i * o->inputs + d]),
                              _mm512_maskz_loadu_ps(inside, o->w + d * (o->outputs - o->inputs) + j), sum);
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

static void waves_backward(const Operation *o, const float *x, const float *dy, float *dx, long m) {
    long k = o->inputs, count = o->outputs - k;
#pragma omp for schedule(static)
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
                dx[i * k + d] += _mm512_reduce_add_ps(_mm512_mul_ps(slope, _mm512_maskz_loadu_ps(inside, o->w + d * count + j)));
        }
    }
}

static const float *forward(const Operation *o, long count, const float *x, long m, void *scratch) {
    for (; count--; x = o++->value) {
        if (o->kind == LINEAR || o->kind == EXACT)
            linear_forward_shared(x, o->w, o->b, o->value, m, o->outputs, o->inputs, o->kind == EXACT ? FULL : COARSE, scratch);
        else if (o->kind == WAVES)
            waves(o, x, m);
        else
            elementwise(o, x, m);
    }
    return x;
}

/* From the gradient of the last value, in p->gradient, to that of x where `needed`; returns where it is. */
static float *backward(const Operation *first, long count, const float *x, long m, const Plan *p, int needed, int threads) {
    float *dy = p->gradient, *dx = p->other;
    for (const Operation *o = first + count - 1; o >= first; o--) {
        const float *input = o == first ? x : o[-1].value;
        float *to = o > first || needed ? dx : 0;
        if (o->kind == LINEAR || o->kind == EXACT)
            linear_backward_shared(input, o->w, dy, o->dw, o->db, to, m, o->outputs, o->inputs, o->kind == EXACT ? FINE : COARSE,
                                   0, o->squares, p->scratch, threads);
        else if (o->kind == WAVES)
            waves_backward(o, input, dy, dx, m);
        else {
            elementwise_backward(o, input, dy, m);
            continue; /* in its place */
        }
        float *swap = dy;
        dy = dx;
        dx = swap;
    }
    return dy;
}

/* z = mean + sigma eps, and the rate of each image; parameters (images, 2 dim) are the means and the log variances. */
static void draw(const Plan *p, const float *parameters, const float *noise, long images, long k) {
    long dim = p->dim;
    const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
#pragma omp for schedule(static)
    for (long i = 0; i < images; i++) {
        __m512 rate = _mm512_setzero_ps();
        for (long j = 0; j < dim; j += 16) {
            __mmask16 inside = first16(dim - j);
            __m512 mean = _mm512_maskz_loadu_ps(inside, parameters + i * 2 * dim + j);
            __m512 log_std = _mm512_mul_ps(half, _mm512_maskz_loadu_ps(inside, parameters + i * 2 * dim + dim + j));
            __m512 variance = exp16(_mm512_add_ps(log_std, log_std)), std = exp16(log_std);
            __m512 kl = _mm512_fmadd_ps(mean, mean, _mm512_sub_ps(variance, one));
            rate = _mm512_mask_add_ps(rate, inside, rate, _mm512_fmsub_ps(half, kl, log_std));
            for (long s = 0; s < k; s++) {
                long at = (s * images + i) * dim + j;
                _mm512_mask_storeu_ps(p->code + at, inside, _mm512_fmadd_ps(std, _mm512_maskz_loadu_ps(inside, noise + at), mean));
            }
        }
        p->rate[i] = _mm512_reduce_add_ps(rate);
    }
}

/* The gradient of the parameters, from that of the codes and of beta / images times the rate. */
static void draw_backward(const Plan *p, const float *parameters, const float *noise, const float *dz, float weight,
                          long images, long k) {
    long dim = p->dim;
    const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f), share = _mm512_set1_ps(weight);
#pragma omp for schedule(static)
    for (long i = 0; i < images; i++)
        for (long j = 0; j < dim; j += 16) {
            __mmask16 inside = first16(dim - j);
            const float *mean_at = parameters + i * 2 * dim + j;
            __m512 log_std = _mm512_mul_ps(half, _mm512_maskz_loadu_ps(inside, mean_at + dim));
            __m512 variance = exp16(_mm512_add_ps(log_std, log_std)), std = exp16(log_std);
            __m512 of_mean = _mm512_mul_ps(share, _mm512_maskz_loadu_ps(inside, mean_at));
            __m512 of_log_std = _mm512_mul_ps(share, _mm512_sub_ps(variance, one));
            for (long s = 0; s < k; s++) {
                long at = (s * images + i) * dim + j;
                __m512 g = _mm512_maskz_loadu_ps(inside, dz + at);
                of_mean = _mm512_add_ps(of_mean, g);
                of_log_std = _mm512_fmadd_ps(g, _mm512_mul_ps(std, _mm512_maskz_loadu_ps(inside, noise + at)), of_log_std);
            }
            _mm512_mask_storeu_ps(p->gradient + i * 2 * dim + j, inside, of_mean);
            _mm512_mask_storeu_ps(p->gradient + i * 2 * dim + dim + j, inside, _mm512_mul_ps(half, of_log_std));
        }
}

/* x (images, pixels), noise (k, images, dim): sets the gradients, and fills what the plan names. */
void elbo_step(const Plan *p, const float *x, const float *noise, long images, long pixels, long k, float beta, int threads) {
#pragma omp parallel num_threads(threads)
    {
        unsigned control = begin_flushing();
        const float *parameters = forward(p->encoder, p->encoders, x, images, p->scratch);
        draw(p, parameters, noise, images, k);
        const float *logits = forward(p->decoder, p->decoders, p->code, k * images, p->scratch);
        bernoulli_shared(logits, x, p->log_px, p->gradient, -1.0f / (float)(k * images), k * images, images, pixels);
        const float *dz = backward(p->decoder, p->decoders, p->code, k * images, p, 1, threads);
#pragma omp for schedule(static)
        for (long i = 0; i < k * images * p->dim; i++) p->code_gradient[i] = dz[i];
        draw_backward(p, parameters, noise, p->code_gradient, beta / (float)images, images, k);
        backward(p->encoder, p->encoders, x, images, p, 0, threads);
#pragma omp single
        {
            p->sums[0] = p->sums[1] = p->sums[2] = 0;
            for (long i = 0; i < images; i++) p->sums[0] += p->rate[i];
            for (long i = 0; i < k * images; i++) p->sums[1] -= p->log_px[i] / (double)k;
            for (long i = 0; i < p->blocks; i++) p->sums[2] += p->squares[i];
        }
        end_flushing(control);
    }
}
