/* The draw on a CPU: one read of each row of logits gives an id and its figures.

   Plain C11 with GNU attributes and pthreads behind a plain C ABI, called by draw_c.py; no
   header of Python or torch. The law is that of reference.py: the tile reservoir with the
   Philox-4x32-10 stream of philox.py. A row is read tile by tile: a tile's largest logit and
   its sum of exp(logit - reference) in the same loop, where `reference` is a logit near the
   largest so far and the sums are rescaled when the largest exceeds it by far. Two tiles are
   read once more at the end: the one that holds the maximum and the winner. top_k keeps
   a heap in that pass; min_p, and top_p without top_k, read a second time the tiles that reach
   their floor. What the filters keep is a list, ascending by id, and the same reservoir.

   Names have no suffix of shape: all arrays here are one row or one tile. Built with
   -fopenmp-simd for the loops marked `simd`, and never with -ffast-math: NaN and infinities have
   a meaning. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

/* The same number as in draw_c.py: raised when `request` or the meaning of a field changes. */
#define ABI 3

/* One build for all machines: the loader takes the widest clone that the processor runs. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* Below this a weight is 0: exp(-87) is the last that float32 holds at full precision. */
#define LOWEST (-87.0f)
/* Nats below which an entropy is 0: what rounding and ids at -inf leave of none. */
#define DUST 1e-30
/* Logits from which a second thread saves more than its start of some 30 microseconds. */
#define WORK_PER_THREAD (1 << 20)
/* Logits that a thread takes at a time: few, so that all threads finish about together. */
#define WORK_PER_TURN (1 << 16)
#define MOST_THREADS 256
/* How far, in nats, a logit may lie above the reference before the sums are rescaled. */
#define HEADROOM 16.0f
/* The cumulative sum finds its block before it finds its id. */
#define BLOCK 32

struct request {
    const void *logits, *unconditional; /* the second NULL without guidance */
    int64_t row_stride, other_stride, rows, columns, tile;
    const double *scale; /* of guidance, one a row */
    int64_t scale_stride;
    const int64_t *seed, *sample, *step, *position;
    int64_t seed_stride, sample_stride, step_stride, position_stride;
    const int64_t *forbidden; /* ascending */
    int64_t forbidden_count;
    const int64_t *span; /* NULL: every column */
    int64_t span_stride;
    int64_t *tokens;
    float *log_prob, *entropy, *margin;
    double top_p;  /* 1 where it is off */
    int64_t top_k; /* 0 where it is off */
    float inverse; /* 1 / temperature */
    float floor;   /* ln(min_p), -inf where it is off */
    int32_t format, greedy, measure_drawn, threads;
};

/* A softmax over the row so far: weights exp((x - reference) * inverse). */
struct law {
    float inverse;
    double mass, moment; /* sum of the weights; sum of weight * exponent */
};

/* One id that a filter keeps, or may keep. */
struct entry {
    float logit;
    int32_t column;
};

struct row {
    const struct request *request;
    int64_t number, first, stop; /* columns that the row may draw, `never` ids among them */
    double *sums;                /* one a block of a tile */
    float *copy, *weights;       /* one tile each */
    float *largest;              /* one a tile of the row */
    struct entry *kept, *work;   /* a row of entries each, where a filter is on */
    int64_t count;               /* of `kept` */
    float scale;                 /* of guidance */
    float reference;             /* what the weights are relative to */
    float peak, rest;            /* the largest logit, the largest in any other tile */
    int64_t best, winner;        /* tiles: of the largest logit, the last accepted one */
    uint32_t pick;               /* the word that picks inside the winner */
};

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* float16 to float32: the exponent is rebased by a product, which also takes subnormals. */
INLINE float float_of_half(uint16_t half)
{
    float value = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t special = value >= 65536.0f ? 0x7f800000u : 0;
    return float_of(bits_of(value) | special | (uint32_t)(half & 0x8000) << 16);
}

/* exp(z) for z in [-87, 16] within 3e-7; exactly 1 at 0, and NaN stays NaN.
   z = n ln 2 + r, and exp(r) is a polynomial of degree 5, relative error 9.2e-8 (minimax). */
INLINE float exponential(float z)
{
    const float round = 0x1.8p23f; /* its last bits then hold the nearest whole number */
    float shifted = z * 0x1.715476p0f + round;
    float n = shifted - round;
    float r = z - n * 0x1.62e43p-1f;
    float p = 0x1.0fa7d8p-7f;
    p = p * r + 0x1.573adp-5f;
    p = p * r + 0x1.555a6ep-3f;
    p = p * r + 0x1.fffdc4p-2f;
    p = p * r + 0x1.fffff6p-1f;
    p = p * r + 1.0f;
    return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

/* What one read of a tile gives. */
struct sums {
    float largest; /* NaN left out */
    double mass, moment;
};

/* Largest logit, mass and moment of n logits of `format`, FLOAT32 or BFLOAT16; the mass is NaN
   where a logit is NaN. -inf weighs e^-87, which no sum beside a peak can hold. */
typedef struct sums sums_function(const void *logits, int64_t n, float reference, float inverse,
                                  int format);

/* Partial sums that a loop keeps side by side. A fixed number, so that the additions run in the
   same order for every format and vector width, and a tile of 1,024 adds up 64 numbers in each. */
#define LANES 16

struct partial {
    float largest[LANES], mass[LANES], moment[LANES];
};

INLINE void add_block(struct partial *so_far, const void *logits, float reference, float inverse,
                      int format)
{
    const float *wide = logits;
    const uint16_t *narrow = logits;
#pragma omp simd
    for (int64_t i = 0; i < LANES; i++) {
        float x = format == BFLOAT16 ? float_of((uint32_t)narrow[i] << 16) : wide[i];
        float z = (x - reference) * inverse;
        z = LOWEST > z ? LOWEST : z; /* in this order a NaN stays */
        float weight = exponential(z);
        so_far->largest[i] = x > so_far->largest[i] ? x : so_far->largest[i];
        so_far->mass[i] += weight;
        so_far->moment[i] += weight * z;
    }
}

/* LANES numbers: the first n logits, or as many of them as there is room for, then -inf. */
INLINE void pad_block(const void *logits, int64_t n, int format, float *padded)
{
    for (int64_t i = 0; i < LANES; i++)
        padded[i] = i >= n               ? -INFINITY
                    : format == BFLOAT16 ? float_of((uint32_t)((const uint16_t *)logits)[i] << 16)
                                         : ((const float *)logits)[i];
}

INLINE struct sums sums_by_loop(const void *logits, int64_t n, float reference, float inverse,
                                int format)
{
    const char *next = logits;
    const int64_t size = format == BFLOAT16 ? 2 : 4;
    struct partial all;
    for (int64_t i = 0; i < LANES; i++) {
        all.largest[i] = -INFINITY;
        all.mass[i] = all.moment[i] = 0;
    }
    for (; n >= LANES; n -= LANES, next += LANES * size)
        add_block(&all, next, reference, inverse, format);
    if (n > 0) {
        float padded[LANES];
        pad_block(next, n, format, padded);
        add_block(&all, padded, reference, inverse, FLOAT32);
    }
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) {
            float other = all.largest[i + half];
            all.largest[i] = other > all.largest[i] ? other : all.largest[i];
            all.mass[i] += all.mass[i + half];
            all.moment[i] += all.moment[i + half];
        }
    return (struct sums){all.largest[0], all.mass[0], all.moment[0]};
}

CLONES
static struct sums sums_anywhere(const void *logits, int64_t n, float reference, float inverse,
                                 int format)
{
    if (format == BFLOAT16)
        return sums_by_loop(logits, n, reference, inverse, BFLOAT16);
    return sums_by_loop(logits, n, reference, inverse, FLOAT32);
}

static sums_function *sums_of = sums_anywhere;

#ifdef __x86_64__
/* The same by hand for AVX-512, half as fast again: the compiler does not prefetch, and the loop
   is too long for the processor to. */
/* Bytes that the loop prefetches: two pages. */
#define AHEAD 8192
#define AVX512 __attribute__((target("avx512f"), always_inline)) static inline

struct lanes {
    __m512 largest, mass, moment;
};

AVX512 void add_lanes(struct lanes *so_far, __m512 x, __m512 reference, __m512 inverse,
                      int heated)
{
    __m512 z = _mm512_sub_ps(x, reference);
    if (heated)
        z = _mm512_mul_ps(z, inverse);
    z = _mm512_max_ps(_mm512_set1_ps(LOWEST), z); /* in this order a NaN stays */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(z, _mm512_set1_ps(0x1.715476p0f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e43p-1f), z);
    __m512 p = _mm512_set1_ps(0x1.0fa7d8p-7f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.573adp-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.555a6ep-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fffdc4p-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fffff6p-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    __m512 weight = _mm512_scalef_ps(p, n);
    so_far->largest = _mm512_max_ps(x, so_far->largest);
    so_far->mass = _mm512_add_ps(so_far->mass, weight);
    so_far->moment = _mm512_fmadd_ps(weight, z, so_far->moment);
}

/* `heated` where the temperature is not 1: to multiply by 1 is one of sixteen steps. */
AVX512 struct sums sums_by_lanes(const void *logits, int64_t n, float reference, float inverse,
                                 int format, int heated)
{
    const __m512 origin = _mm512_set1_ps(reference), slope = _mm512_set1_ps(inverse);
    const int64_t size = format == BFLOAT16 ? 2 : 4;
    struct lanes so_far[2];
    int64_t j = 0;
    for (int half = 0; half < 2; half++) {
        so_far[half].largest = _mm512_set1_ps(-INFINITY);
        so_far[half].mass = so_far[half].moment = _mm512_setzero_ps();
    }
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
        const char *next = (const char *)logits + j * size;
        __builtin_prefetch(next + AHEAD);
        if (format == FLOAT32)
            __builtin_prefetch(next + AHEAD + 64);
        for (int half = 0; half < 2; half++, next += LANES * size) {
            __m512 x = format == BFLOAT16
                           ? _mm512_castsi512_ps(_mm512_slli_epi32(
                                 _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)next)),
                                 16))
                           : _mm512_loadu_ps(next);
            add_lanes(&so_far[half], x, origin, slope, heated);
        }
    }
    for (; j < n; j += LANES) {
        float padded[LANES];
        pad_block((const char *)logits + j * size, n - j, format, padded);
        add_lanes(&so_far[0], _mm512_loadu_ps(padded), origin, slope, heated);
    }
    return (struct sums){
        _mm512_reduce_max_ps(_mm512_max_ps(so_far[1].largest, so_far[0].largest)),
        _mm512_reduce_add_ps(_mm512_add_ps(so_far[0].mass, so_far[1].mass)),
        _mm512_reduce_add_ps(_mm512_add_ps(so_far[0].moment, so_far[1].moment)),
    };
}

__attribute__((target("avx512f"))) static struct sums
sums_avx512(const void *logits, int64_t n, float reference, float inverse, int format)
{
    if (format == BFLOAT16)
        return inverse == 1 ? sums_by_lanes(logits, n, reference, 1, BFLOAT16, 0)
                            : sums_by_lanes(logits, n, reference, inverse, BFLOAT16, 1);
    return inverse == 1 ? sums_by_lanes(logits, n, reference, 1, FLOAT32, 0)
                        : sums_by_lanes(logits, n, reference, inverse, FLOAT32, 1);
}

#endif

/* Takes the widest loop that the processor runs, or the one for any; 1 where that is AVX-512. */
EXPORT int32_t onepass_choose(int32_t widest)
{
    sums_of = sums_anywhere;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (widest && __builtin_cpu_supports("avx512f"))
        sums_of = sums_avx512;
#endif
    return sums_of != sums_anywhere;
}

/* The same sums relative to a higher peak. */
INLINE void rescale(struct law *law, float old, float peak)
{
    if (law->mass > 0) {
        double shift = ((double)old - peak) * law->inverse, factor = exp(shift);
        law->moment = factor * (law->moment + shift * law->mass);
        law->mass *= factor;
    }
}

/* n numbers of a format as float32. */
INLINE void converted(const void *numbers, int64_t offset, int64_t n, int format, float *out)
{
    if (format == FLOAT32) {
        memcpy(out, (const float *)numbers + offset, n * sizeof *out);
    } else if (format == BFLOAT16) {
        const uint16_t *x = (const uint16_t *)numbers + offset;
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            out[j] = float_of((uint32_t)x[j] << 16);
    } else {
        const uint16_t *x = (const uint16_t *)numbers + offset;
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            out[j] = float_of_half(x[j]);
    }
}

/* The first of the forbidden columns that is not below `column`, by its number. */
INLINE int64_t forbidden_from(const struct request *request, int64_t column)
{
    int64_t low = 0, high = request->forbidden_count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (request->forbidden[middle] < column)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Columns of a tile and its logits: the caller's own, or a copy with the branches mixed and
   forbidden ids at -inf. */
struct tile {
    int64_t start, count;
    const void *logits;
    int format; /* of `logits`: FLOAT32 or BFLOAT16 */
};

INLINE struct tile tile_of(const struct row *row, int64_t number, int as_floats)
{
    const struct request *request = row->request;
    int64_t first = number * request->tile, stop = first + request->tile;
    first = first < row->first ? row->first : first;
    stop = stop > row->stop ? row->stop : stop;
    struct tile tile = {.start = first, .count = stop - first};
    int64_t low = forbidden_from(request, first);
    int forbids = low < request->forbidden_count && request->forbidden[low] < stop;
    int guided = request->unconditional && row->scale != 1;
    int64_t offset = row->number * request->row_stride + first;
    if (!forbids && !guided && request->format == FLOAT32) {
        tile.logits = (const float *)request->logits + offset;
        return tile;
    }
    if (!forbids && !guided && !as_floats && request->format == BFLOAT16) {
        tile.logits = (const uint16_t *)request->logits + offset;
        tile.format = BFLOAT16;
        return tile;
    }
    float *copy = row->copy, *other = row->weights;
    tile.logits = copy;
    converted(request->logits, offset, tile.count, request->format, copy);
    if (guided) {
        const float scale = row->scale;
        offset = row->number * request->other_stride + first;
        converted(request->unconditional, offset, tile.count, request->format, other);
#pragma omp simd
        for (int64_t j = 0; j < tile.count; j++) {
            float mixed = other[j] + scale * (copy[j] - other[j]);
            int excluded = (copy[j] == -INFINITY) & (other[j] == -INFINITY);
            copy[j] = excluded ? -INFINITY : mixed;
        }
    }
    for (; low < request->forbidden_count && request->forbidden[low] < stop; low++)
        copy[request->forbidden[low] - first] = -INFINITY;
    return tile;
}

/* (x + 0.5) 2^-32, exact, never 0 and never 1. */
INLINE double uniform_of(uint32_t word)
{
    return (word + 0.5) * 0x1p-32;
}

/* The first two words of the counter (position, sample, step, tile); a draw's purpose is 0. */
INLINE void philox(const struct row *row, int64_t tile, uint32_t *accept, uint32_t *pick)
{
    const struct request *request = row->request;
    int64_t n = row->number;
    uint64_t seed = (uint64_t)request->seed[n * request->seed_stride];
    uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    uint32_t a = (uint32_t)request->position[n * request->position_stride];
    uint32_t b = (uint32_t)request->sample[n * request->sample_stride];
    uint32_t c = (uint32_t)request->step[n * request->step_stride], d = (uint32_t)tile;
    for (int i = 0; i < 10; i++) {
        uint64_t left = (uint64_t)0xD2511F53u * a, right = (uint64_t)0xCD9E8D57u * c;
        a = (uint32_t)(right >> 32) ^ b ^ low;
        b = (uint32_t)right;
        c = (uint32_t)(left >> 32) ^ d ^ high;
        d = (uint32_t)left;
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    *accept = a;
    *pick = b;
}

/* Makes a tile the winner with probability s / (S + s), S the mass before it; `with_it` is
   S + s. */
INLINE void offer(struct row *row, int64_t tile, double mass, double with_it)
{
    uint32_t accept, pick;
    if (mass > 0) {
        philox(row, tile, &accept, &pick);
        if (uniform_of(accept) * with_it < mass) {
            row->winner = tile;
            row->pick = pick;
        }
    }
}

/* Whether a precedes b in the order of the filters: larger logit first, of equals the lower id. */
INLINE int ahead(struct entry a, struct entry b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.column < b.column);
}

/* Replaces the root of a heap, which is its last entry in that order, and sifts down. */
INLINE void sink(struct entry *heap, int64_t count, struct entry entry)
{
    int64_t at = 0;
    for (int64_t child = 1; child < count; child = 2 * at + 1) {
        if (child + 1 < count && ahead(heap[child], heap[child + 1]))
            child++;
        if (!ahead(entry, heap[child]))
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = entry;
}

/* Adds an entry to a heap of `at` entries. */
INLINE void rise(struct entry *heap, int64_t at, struct entry entry)
{
    while (at > 0 && ahead(heap[(at - 1) / 2], entry)) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap[at] = entry;
}

/* The largest of at most BLOCK logits from x on. */
INLINE float largest_of_block(const float *x, int64_t n)
{
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; j++)
        largest = x[j] > largest ? x[j] : largest;
    return largest;
}

/* Updates the top_k so far, a heap in `kept`, with the logits of a tile. */
INLINE void take_top(struct row *row, int64_t tile, float largest)
{
    const int64_t most = row->request->top_k;
    if (row->count == most && largest <= row->kept[0].logit)
        return;
    const struct tile part = tile_of(row, tile, 1);
    const float *x = part.logits;
    for (int64_t first = 0; first < part.count; first += BLOCK) {
        int64_t stop = first + BLOCK < part.count ? first + BLOCK : part.count;
        if (row->count == most && largest_of_block(x + first, stop - first) <= row->kept[0].logit)
            continue;
        for (int64_t j = first; j < stop; j++) {
            struct entry entry = {x[j], (int32_t)(part.start + j)};
            if (row->count < most && x[j] > -INFINITY)
                rise(row->kept, row->count++, entry);
            else if (row->count == most && x[j] > row->kept[0].logit)
                sink(row->kept, most, entry);
        }
    }
}

/* Reads the row once: both laws (which may be the same), the top_k and, with `reservoir`, the
   winner. Returns 0 for a row without a law: NaN, +inf, or nothing finite. */
INLINE int read_row(struct row *row, struct law *measured, struct law *drawn, int reservoir)
{
    const int64_t width = row->request->tile;
    const float steepest = drawn->inverse > measured->inverse ? drawn->inverse : measured->inverse;
    for (int64_t number = row->first / width; number * width < row->stop; number++) {
        const struct tile tile = tile_of(row, number, 0);
        struct sums sums = {.largest = INFINITY};
        if (row->peak > -INFINITY)
            sums = sums_of(tile.logits, tile.count, row->reference, measured->inverse, tile.format);
        if (!((sums.largest - row->reference) * steepest <= HEADROOM)) {
            /* The first tile, or one far above all before it: its largest logit, then its sums. */
            float largest = sums.largest;
            if (row->peak == -INFINITY)
                largest = sums_of(tile.logits, tile.count, 0, 0, tile.format).largest;
            if (largest == INFINITY)
                return 0;
            float reference = largest > -INFINITY ? largest : 0;
            rescale(measured, row->reference, reference);
            if (drawn != measured)
                rescale(drawn, row->reference, reference);
            row->reference = reference;
            sums = sums_of(tile.logits, tile.count, reference, measured->inverse, tile.format);
        }
        if (sums.mass != sums.mass)
            return 0;
        row->largest[number] = sums.largest;
        if (sums.largest == -INFINITY)
            continue;
        if (sums.largest > row->peak) {
            row->rest = row->peak;
            row->peak = sums.largest;
            row->best = number;
        } else if (sums.largest > row->rest) {
            row->rest = sums.largest;
        }
        measured->mass += sums.mass;
        measured->moment += sums.moment;
        if (drawn != measured) {
            sums = sums_of(tile.logits, tile.count, row->reference, drawn->inverse, tile.format);
            drawn->mass += sums.mass;
            drawn->moment += sums.moment;
        }
        if (row->request->top_k)
            take_top(row, number, sums.largest);
        if (reservoir)
            offer(row, number, sums.mass, drawn->mass);
    }
    return row->peak > -INFINITY;
}

/* Fills `kept` with the ids at or above `floor`; only tiles that hold one are read again. */
INLINE void collect(struct row *row, float floor)
{
    const int64_t width = row->request->tile;
    row->count = 0;
    for (int64_t number = row->first / width; number * width < row->stop; number++) {
        if (row->largest[number] < floor)
            continue;
        const struct tile tile = tile_of(row, number, 1);
        const float *x = tile.logits;
        for (int64_t first = 0; first < tile.count; first += BLOCK) {
            int64_t stop = first + BLOCK < tile.count ? first + BLOCK : tile.count;
            if (largest_of_block(x + first, stop - first) < floor)
                continue;
            for (int64_t j = first; j < stop; j++) {
                row->kept[row->count] = (struct entry){x[j], (int32_t)(tile.start + j)};
                row->count += x[j] >= floor && x[j] > -INFINITY;
            }
        }
    }
}

/* exp((logit - peak) / temperature), 0 where float32 has no such number. */
INLINE float weight_of(const struct row *row, float logit)
{
    float z = (logit - row->peak) * row->request->inverse;
    return z < LOWEST ? 0.0f : exponential(z);
}

static int by_column(const void *a, const void *b)
{
    int32_t left = ((const struct entry *)a)->column, right = ((const struct entry *)b)->column;
    return (left > right) - (left < right);
}

/* The last of the fewest kept entries, taken in order, whose weights reach `target`: Hoare's
   selection by weight, in a copy that it reorders. */
INLINE struct entry edge_of(const struct row *row, double target)
{
    struct entry *a = row->work;
    int64_t low = 0, high = row->count;
    double before = 0;
    memcpy(a, row->kept, high * sizeof *a);
    while (high - low > 1) {
        struct entry x = a[low], y = a[low + (high - low) / 2], z = a[high - 1], pivot;
        pivot = ahead(x, y) ? (ahead(y, z) ? y : ahead(x, z) ? z : x)
                            : (ahead(x, z) ? x : ahead(y, z) ? z : y);
        /* No two are equal: first what is ahead of the pivot, then the pivot, then the others. */
        int64_t middle = low, at;
        double mass = 0;
        for (int64_t i = low; i < high; i++) {
            struct entry entry = a[i];
            if (ahead(entry, pivot)) {
                mass += weight_of(row, entry.logit);
                a[i] = a[middle];
                a[middle++] = entry;
            }
        }
        if (before + mass >= target) {
            high = middle;
            continue;
        }
        before += mass + weight_of(row, pivot.logit);
        if (before >= target)
            return pivot;
        for (at = middle; a[at].column != pivot.column; at++)
            continue;
        a[at] = a[middle];
        a[middle] = pivot;
        low = middle + 1;
    }
    return low < high ? a[low] : (struct entry){-INFINITY, INT32_MAX};
}

/* Leaves in `kept`, ascending by id, what top_k, top_p and min_p leave, in that order. `whole`
   is the mass that top_p renormalises where there is no top_k, relative to the peak. */
INLINE void filter(struct row *row, double whole)
{
    const struct request *request = row->request;
    const int nucleus = request->top_p < 1;
    if (request->top_k) {
        qsort(row->kept, row->count, sizeof *row->kept, by_column);
        whole = 0;
        for (int64_t i = 0; i < row->count; i++)
            whole += weight_of(row, row->kept[i].logit);
    } else {
        /* An id of less than (1 - p) / V is never needed: all such miss 1 - p together. */
        double floor = nucleus ? log((1 - request->top_p) * whole / (row->stop - row->first)) - 0.01
                               : request->floor - 1e-5;
        floor = floor < LOWEST ? LOWEST : floor;
        collect(row, nextafterf((float)(row->peak + floor / request->inverse), -INFINITY));
    }
    struct entry edge = {-INFINITY, INT32_MAX};
    if (nucleus)
        edge = edge_of(row, request->top_p * whole);
    int64_t count = 0;
    for (int64_t i = 0; i < row->count; i++) {
        struct entry entry = row->kept[i];
        row->kept[count] = entry;
        count += !ahead(edge, entry)
                 && (entry.logit - row->peak) * request->inverse >= request->floor;
    }
    row->count = count;
}

/* The law of the kept ids, relative to the peak, and the reservoir over their tiles. */
INLINE void weigh_kept(struct row *row, struct law *drawn, int reservoir)
{
    const int64_t width = row->request->tile;
    for (int64_t i = 0; i < row->count;) {
        const int64_t tile = row->kept[i].column / width;
        double mass = 0;
        for (; i < row->count && row->kept[i].column / width == tile; i++) {
            float weight = weight_of(row, row->kept[i].logit);
            mass += weight;
            drawn->moment += weight * (row->kept[i].logit - row->peak) * drawn->inverse;
        }
        drawn->mass += mass;
        if (reservoir)
            offer(row, tile, mass, drawn->mass);
    }
}

/* The kept id inside the winner by inverse CDF, and its logit. */
INLINE int64_t inside_kept(const struct row *row, float *logit)
{
    const int64_t width = row->request->tile;
    int64_t first = 0, stop, found;
    double total = 0, before = 0;
    while (row->kept[first].column / width != row->winner)
        first++;
    for (stop = first; stop < row->count && row->kept[stop].column / width == row->winner; stop++)
        total += weight_of(row, row->kept[stop].logit);
    const double target = uniform_of(row->pick) * total;
    found = first;
    for (int64_t i = first; i < stop && before <= target; i++) {
        float weight = weight_of(row, row->kept[i].logit);
        found = weight > 0 ? i : found;
        before += weight;
    }
    *logit = row->kept[found].logit;
    return row->kept[found].column;
}

/* The second largest kept logit, -inf where there is one alone. */
INLINE float second_kept(const struct row *row)
{
    float second = -INFINITY;
    int met = 0;
    for (int64_t i = 0; i < row->count; i++) {
        float logit = row->kept[i].logit;
        if (logit == row->peak && !met)
            met = 1;
        else
            second = logit > second ? logit : second;
    }
    return second;
}

/* Writes the weights of n logits and returns their sum. */
INLINE double weights_of(const float *x, int64_t n, float peak, float inverse, float *weights)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
        float z = (x[j] - peak) * inverse;
        float weight = exponential(z < LOWEST ? LOWEST : z);
        weights[j] = z < LOWEST ? 0.0f : weight;
        sum += weights[j];
    }
    return sum;
}

/* The id inside the winner by inverse CDF in float64, and its logit. */
INLINE int64_t inside(const struct row *row, float *logit)
{
    const struct tile tile = tile_of(row, row->winner, 1);
    const float *x = tile.logits;
    const float inverse = row->request->inverse;
    const int64_t n = tile.count;
    /* The tile's own peak serves, so that no winner underflows. */
    const float peak = sums_of(x, n, 0, 0, FLOAT32).largest;
    double total = 0, before = 0;
    int64_t block = 0, whole;
    for (whole = 0; whole + BLOCK <= n; whole += BLOCK)
        total += row->sums[whole / BLOCK]
            = weights_of(x + whole, BLOCK, peak, inverse, row->weights + whole);
    if (whole < n)
        total += row->sums[whole / BLOCK]
            = weights_of(x + whole, n - whole, peak, inverse, row->weights + whole);
    const double target = uniform_of(row->pick) * total;
    while ((block + 1) * BLOCK < n && before + row->sums[block] <= target)
        before += row->sums[block++];
    int64_t stop = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n, found = block * BLOCK;
    for (int64_t j = found; j < stop && before <= target; j++) {
        found = row->weights[j] > 0 ? j : found;
        before += row->weights[j];
    }
    *logit = x[found];
    return tile.start + found;
}

/* The lowest id of the maximum, and the second largest logit of the row. */
INLINE int64_t at_peak(const struct row *row, float *second)
{
    const struct tile tile = tile_of(row, row->best, 1);
    const float *x = tile.logits;
    float peak = row->peak, below = row->rest;
    int64_t token = 0, ties = 0;
#pragma omp simd reduction(max : below) reduction(+ : ties)
    for (int64_t j = 0; j < tile.count; j++) {
        ties += x[j] == peak;
        float other = x[j] < peak ? x[j] : -INFINITY;
        below = other > below ? other : below;
    }
    while (x[token] != peak)
        token++;
    *second = ties > 1 ? peak : below;
    return tile.start + token;
}

/* The lowest id that the row may draw. */
INLINE int64_t lowest_permitted(const struct row *row)
{
    int64_t lowest = row->first;
    for (int64_t i = 0; i < row->request->forbidden_count; i++)
        lowest += row->request->forbidden[i] == lowest;
    return lowest;
}

/* Log-probability of a logit, entropy and margin under a law relative to `origin`. */
INLINE void write_figures(const struct row *row, const struct law *law, float origin, float logit,
                          float second)
{
    const struct request *request = row->request;
    const double log_mass = log(law->mass), inverse = law->inverse;
    const double largest = exp(((double)row->peak - origin) * inverse);
    const double gap = ((double)second - row->peak) * inverse;
    request->log_prob[row->number] = (float)(((double)logit - origin) * inverse - log_mass);
    const double entropy = log_mass - law->moment / law->mass;
    request->entropy[row->number] = entropy > DUST ? (float)entropy : 0;
    request->margin[row->number] = (float)(largest * -expm1(gap) / law->mass);
}

CLONES
void onepass_draw_row(const struct request *request, int64_t number, void *scratch)
{
    const int64_t tiles = (request->columns + request->tile - 1) / request->tile;
    const int filtered = request->top_k || request->top_p < 1 || request->floor > -INFINITY;
    const int reservoir = !request->greedy;
    struct row row = {.request = request, .number = number, .stop = request->columns};
    row.sums = scratch;
    row.copy = (float *)(row.sums + (request->tile + BLOCK - 1) / BLOCK);
    row.weights = row.copy + request->tile;
    row.largest = row.weights + request->tile;
    row.kept = (struct entry *)(row.largest + tiles);
    row.work = row.kept + request->columns;
    row.peak = row.rest = -INFINITY;
    row.scale = request->unconditional ? (float)request->scale[number * request->scale_stride] : 1;
    if (request->span) {
        const int64_t *span = request->span + number * request->span_stride;
        row.first = span[0] > 0 ? span[0] : 0;
        row.stop = span[1] < request->columns ? span[1] : request->columns;
    }
    struct law model = {.inverse = 1}, drawn = {.inverse = request->inverse};
    struct law *measured = request->measure_drawn || request->inverse == 1 ? &drawn : &model;
    /* top_p without top_k needs the mass of the whole row at the draw's temperature. */
    struct law *read = filtered && (request->top_k || request->top_p == 1) ? measured : &drawn;
    if (row.first >= row.stop || !read_row(&row, measured, read, reservoir && !filtered)) {
        request->tokens[number] = lowest_permitted(&row);
        request->log_prob[number] = request->entropy[number] = request->margin[number] = NAN;
        return;
    }
    float second, logit = row.peak, origin = row.reference;
    int64_t token = at_peak(&row, &second);
    if (filtered) {
        struct law left = {.inverse = request->inverse};
        filter(&row, read->mass * exp(((double)row.reference - row.peak) * read->inverse));
        weigh_kept(&row, &left, reservoir);
        if (reservoir)
            token = inside_kept(&row, &logit);
        if (request->measure_drawn) {
            second = second_kept(&row);
            write_figures(&row, &left, row.peak, logit, second);
        }
    } else if (reservoir) {
        token = inside(&row, &logit);
    }
    request->tokens[number] = token;
    if (!filtered || !request->measure_drawn)
        write_figures(&row, measured, origin, logit, second);
}

/* Threads take rows in turns, a few at a time, so that all finish about together. */
struct work {
    const struct request *request;
    int64_t *next, turn;
    char *scratch;
};

static void *take_rows(void *argument)
{
    const struct work *work = argument;
    const int64_t rows = work->request->rows;
    for (;;) {
        int64_t first = __atomic_fetch_add(work->next, work->turn, __ATOMIC_RELAXED);
        if (first >= rows)
            return NULL;
        int64_t stop = first + work->turn < rows ? first + work->turn : rows;
        for (int64_t row = first; row < stop; row++)
            onepass_draw_row(work->request, row, work->scratch);
    }
}

EXPORT int32_t onepass_abi(void)
{
    return ABI;
}

/* Draws every row of a request; 0, or -1 where there is no memory for the tiles. */
EXPORT int32_t onepass_draw(const struct request *request)
{
    int64_t tiles = (request->columns + request->tile - 1) / request->tile;
    int64_t each = (request->tile + BLOCK - 1) / BLOCK * sizeof(double);
    each += (2 * request->tile + tiles) * sizeof(float);
    if (request->top_k || request->top_p < 1 || request->floor > -INFINITY)
        each += 2 * request->columns * sizeof(struct entry);
    each = (each + 63) / 64 * 64;
    int64_t next = 0, turn = WORK_PER_TURN / request->columns;
    int64_t threads = request->rows * request->columns / WORK_PER_THREAD;
    turn = turn < 1 ? 1 : turn;
    threads = threads > request->threads ? request->threads : threads;
    threads = threads > request->rows ? request->rows : threads;
    threads = threads > MOST_THREADS ? MOST_THREADS : threads;
    threads = threads < 1 ? 1 : threads;
    char *scratch = malloc(threads * each);
    if (!scratch)
        return -1;
    struct work work[MOST_THREADS];
    pthread_t others[MOST_THREADS];
    int64_t started = 0;
    for (int64_t i = 0; i < threads; i++)
        work[i] = (struct work){request, &next, turn, scratch + i * each};
    /* Where no more threads can be started, those that run take all rows. */
    while (started + 1 < threads
           && pthread_create(&others[started], NULL, take_rows, &work[started + 1]) == 0)
        started++;
    take_rows(&work[0]);
    for (int64_t i = 0; i < started; i++)
        pthread_join(others[i], NULL);
    free(scratch);
    return 0;
}
