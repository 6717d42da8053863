/* The draw on a CPU: one read of each row of logits gives an id and its figures.

   Plain C11 with GNU attributes and pthreads behind a plain C ABI, called by draw_c.py; no
   header of Python or torch. The law is that of reference.py: the tile reservoir with the
   Philox-4x32-10 stream of philox.py. A row is worked on tile by tile, each tile twice while
   it lies in the first cache: its largest logit, then the sum of exp(logit - peak), where
   `peak` is the largest logit so far and the sums so far are rescaled when it rises. Two
   tiles are looked at once more at the end: the one that holds the maximum and the winner.

   Names end in nothing: all arrays here are one row or one tile. Built with -fopenmp-simd for
   the loops marked `simd`, and never with -ffast-math: NaN and infinities have a meaning. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The same number as in draw_c.py: raised when `request` or the meaning of a field changes. */
#define ABI 1

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
/* Logits for which a second thread is worth its start of some 30 microseconds. */
#define WORK_PER_THREAD (1 << 20)
/* Logits that a thread takes at a time, so that one that waits holds little back. */
#define WORK_PER_TURN (1 << 16)
#define MOST_THREADS 256
/* Weights are added up in float32 over so many, and those sums in float64. */
#define PART 256
/* The cumulative sum finds its block before it finds its id. */
#define BLOCK 32

struct request {
    const void *logits;
    int64_t row_stride, rows, columns, tile;
    const int64_t *seed, *sample, *step, *position;
    int64_t seed_stride, sample_stride, step_stride, position_stride;
    const int64_t *forbidden; /* ascending */
    int64_t forbidden_count;
    const int64_t *span; /* NULL: every column */
    int64_t span_stride;
    int64_t *tokens;
    float *log_prob, *entropy, *margin;
    float inverse; /* 1 / temperature */
    float floor;   /* ln(min_p) */
    int32_t format, greedy, filtered, measure_drawn, threads;
};

/* A softmax over the row so far: weights exp((x - peak) * inverse), 0 below `lowest`. */
struct law {
    float inverse, lowest;
    double mass, moment; /* sum of the weights; sum of weight * exponent */
};

struct row {
    const struct request *asked;
    int64_t number, first, stop; /* columns that the row may draw, `never` ids among them */
    double *sums;                /* one a block of a tile */
    float *copy, *weights;       /* one tile each */
    float *largest;              /* one a tile of the row */
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

/* exp(z) for z in [-87, 0] within 1.5 units in the last place; NaN stays NaN.
   z = n ln 2 + r, and exp(r) = 1 + r + r^2 q(r) with q of degree 4, relative error 3e-9. */
INLINE float exponential(float z)
{
    const float round = 0x1.8p23f; /* its last bits then hold the nearest whole number */
    float shifted = z * 0x1.715476p0f + round;
    float n = shifted - round;
    float r = z - n * 0x1.62ep-1f;
    r = r - n * 0x1.0bfbe8p-15f;
    float q = 0x1.6a244cp-10f;
    q = q * r + 0x1.1239d4p-7f;
    q = q * r + 0x1.5558f2p-5f;
    q = q * r + 0x1.555492p-3f;
    q = q * r + 0x1.fffffcp-2f;
    float p = 1.0f + (r + r * r * q);
    return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

/* The largest of n logits, NaN left out; -inf of none. */
INLINE float largest_of(const float *x, int64_t n)
{
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; j++)
        largest = x[j] > largest ? x[j] : largest;
    return largest;
}

/* Adds a tile to a law and returns the tile's mass; NaN where a logit is NaN. */
INLINE double weigh(struct law *law, const float *x, int64_t n, float peak)
{
    const float inverse = law->inverse, lowest = law->lowest;
    double tile_mass = 0;
    for (int64_t first = 0; first < n; first += PART) {
        int64_t stop = first + PART < n ? first + PART : n;
        float mass = 0, moment = 0;
#pragma omp simd reduction(+ : mass, moment)
        for (int64_t j = first; j < stop; j++) {
            float z = (x[j] - peak) * inverse;
            float clamped = z < lowest ? lowest : z;
            float weight = exponential(clamped);
            weight = z < lowest ? 0.0f : weight;
            mass += weight;
            moment += weight * clamped;
        }
        tile_mass += mass;
        law->moment += moment;
    }
    law->mass += tile_mass;
    return tile_mass;
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

/* The logits of one tile, (start, count) in columns; never ids are -inf in a copy. */
INLINE const float *logits_of(const struct row *row, int64_t tile, int64_t *start, int64_t *count)
{
    const struct request *asked = row->asked;
    int64_t first = tile * asked->tile, stop = first + asked->tile;
    first = first < row->first ? row->first : first;
    stop = stop > row->stop ? row->stop : stop;
    int64_t n = stop - first, low = 0, high = asked->forbidden_count;
    *start = first;
    *count = n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (asked->forbidden[middle] < first)
            low = middle + 1;
        else
            high = middle;
    }
    int forbids = low < asked->forbidden_count && asked->forbidden[low] < stop;
    int64_t offset = row->number * asked->row_stride + first;
    float *copy = row->copy;
    if (asked->format == FLOAT32) {
        const float *x = (const float *)asked->logits + offset;
        if (!forbids)
            return x;
        memcpy(copy, x, n * sizeof *x);
    } else if (asked->format == BFLOAT16) {
        const uint16_t *x = (const uint16_t *)asked->logits + offset;
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            copy[j] = float_of((uint32_t)x[j] << 16);
    } else {
        const uint16_t *x = (const uint16_t *)asked->logits + offset;
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            copy[j] = float_of_half(x[j]);
    }
    for (; low < asked->forbidden_count && asked->forbidden[low] < stop; low++)
        copy[asked->forbidden[low] - first] = -INFINITY;
    return copy;
}

/* (x + 0.5) 2^-32, exact, never 0 and never 1. */
INLINE double uniform_of(uint32_t word)
{
    return (word + 0.5) * 0x1p-32;
}

/* The first two words of the counter (position, sample, step, tile); a draw's purpose is 0. */
INLINE void philox(const struct row *row, int64_t tile, uint32_t *accept, uint32_t *pick)
{
    const struct request *asked = row->asked;
    int64_t n = row->number;
    uint64_t seed = (uint64_t)asked->seed[n * asked->seed_stride];
    uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    uint32_t a = (uint32_t)asked->position[n * asked->position_stride];
    uint32_t b = (uint32_t)asked->sample[n * asked->sample_stride];
    uint32_t c = (uint32_t)asked->step[n * asked->step_stride], d = (uint32_t)tile;
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

/* Makes a tile the winner with probability s / (S + s), S the mass before it. */
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

/* Reads the row once: peak, both laws (which may be one) and, unless greedy, the reservoir.
   Returns 0 for a row without a law: NaN, +inf, or nothing finite. */
INLINE int read_row(struct row *row, struct law *measured, struct law *drawn, int reservoir)
{
    const int64_t width = row->asked->tile;
    int64_t start, n;
    for (int64_t tile = row->first / width; tile * width < row->stop; tile++) {
        const float *x = logits_of(row, tile, &start, &n);
        float largest = largest_of(x, n);
        row->largest[tile] = largest;
        if (largest == INFINITY)
            return 0;
        if (largest == -INFINITY) {
            for (int64_t j = 0; j < n; j++)
                if (x[j] != x[j])
                    return 0;
            continue;
        }
        if (largest > row->peak) {
            rescale(measured, row->peak, largest);
            if (drawn != measured)
                rescale(drawn, row->peak, largest);
            row->rest = row->peak;
            row->peak = largest;
            row->best = tile;
        } else if (largest > row->rest) {
            row->rest = largest;
        }
        double mass = weigh(measured, x, n, row->peak);
        if (mass != mass)
            return 0;
        if (drawn != measured)
            mass = weigh(drawn, x, n, row->peak);
        if (reservoir)
            offer(row, tile, mass, drawn->mass);
    }
    return row->peak > -INFINITY;
}

/* The draw after min_p: only tiles that hold an id of at least min_p are looked at again. */
INLINE void read_kept(struct row *row, struct law *drawn, int reservoir)
{
    const int64_t width = row->asked->tile;
    int64_t start, n;
    for (int64_t tile = row->first / width; tile * width < row->stop; tile++) {
        if ((row->largest[tile] - row->peak) * drawn->inverse < drawn->lowest)
            continue;
        const float *x = logits_of(row, tile, &start, &n);
        double mass = weigh(drawn, x, n, row->peak);
        if (reservoir)
            offer(row, tile, mass, drawn->mass);
    }
}

/* Writes the weights of n logits and returns their sum. */
INLINE double weights_of(const float *x, int64_t n, float peak, const struct law *law,
                         float *weights)
{
    const float inverse = law->inverse, lowest = law->lowest;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
        float z = (x[j] - peak) * inverse;
        float weight = exponential(z < lowest ? lowest : z);
        weights[j] = z < lowest ? 0.0f : weight;
        sum += weights[j];
    }
    return sum;
}

/* The id inside the winner by inverse CDF in float64, and its logit. */
INLINE int64_t inside(const struct row *row, const struct law *drawn, float *logit)
{
    int64_t start, n, block = 0, whole;
    const float *x = logits_of(row, row->winner, &start, &n);
    /* Without a filter the tile's own peak serves, so that no winner underflows. */
    const float peak = row->asked->filtered ? row->peak : largest_of(x, n);
    double total = 0, before = 0;
    for (whole = 0; whole + BLOCK <= n; whole += BLOCK)
        total += row->sums[whole / BLOCK]
            = weights_of(x + whole, BLOCK, peak, drawn, row->weights + whole);
    if (whole < n)
        total += row->sums[whole / BLOCK]
            = weights_of(x + whole, n - whole, peak, drawn, row->weights + whole);
    const double target = uniform_of(row->pick) * total;
    while ((block + 1) * BLOCK < n && before + row->sums[block] <= target)
        before += row->sums[block++];
    int64_t stop = (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n, found = block * BLOCK;
    for (int64_t j = found; j < stop && before <= target; j++) {
        found = row->weights[j] > 0 ? j : found;
        before += row->weights[j];
    }
    *logit = x[found];
    return start + found;
}

/* The lowest id of the maximum, and the second largest logit of the row. */
INLINE int64_t at_peak(const struct row *row, float *second)
{
    int64_t start, n, token = 0, ties = 0;
    const float *x = logits_of(row, row->best, &start, &n);
    float peak = row->peak, below = row->rest;
#pragma omp simd reduction(max : below) reduction(+ : ties)
    for (int64_t j = 0; j < n; j++) {
        ties += x[j] == peak;
        float other = x[j] < peak ? x[j] : -INFINITY;
        below = other > below ? other : below;
    }
    while (x[token] != peak)
        token++;
    *second = ties > 1 ? peak : below;
    return start + token;
}

/* The lowest id that the row may draw. */
INLINE int64_t lowest_permitted(const struct row *row)
{
    int64_t lowest = row->first;
    for (int64_t i = 0; i < row->asked->forbidden_count; i++)
        lowest += row->asked->forbidden[i] == lowest;
    return lowest;
}

CLONES
void onepass_draw_row(const struct request *asked, int64_t number, double *scratch)
{
    struct row row = {.asked = asked, .number = number, .stop = asked->columns};
    row.sums = scratch;
    row.copy = (float *)(scratch + (asked->tile + BLOCK - 1) / BLOCK);
    row.weights = row.copy + asked->tile;
    row.largest = row.weights + asked->tile;
    row.peak = row.rest = -INFINITY;
    if (asked->span) {
        const int64_t *span = asked->span + number * asked->span_stride;
        row.first = span[0] > 0 ? span[0] : 0;
        row.stop = span[1] < asked->columns ? span[1] : asked->columns;
    }
    struct law model = {.inverse = 1, .lowest = LOWEST};
    struct law drawn = {.inverse = asked->inverse, .lowest = LOWEST};
    struct law *measured = asked->measure_drawn || asked->inverse == 1 ? &drawn : &model;
    int sound = row.first < row.stop, reservoir = !asked->greedy;
    if (asked->filtered) {
        sound = sound && read_row(&row, &model, &model, 0);
        drawn.lowest = asked->floor > LOWEST ? asked->floor : LOWEST;
        if (sound)
            read_kept(&row, &drawn, reservoir);
        measured = asked->measure_drawn ? &drawn : &model;
    } else {
        sound = sound && read_row(&row, measured, &drawn, reservoir);
    }
    if (!sound) {
        asked->tokens[number] = lowest_permitted(&row);
        asked->log_prob[number] = asked->entropy[number] = asked->margin[number] = NAN;
        return;
    }
    float second, logit = row.peak;
    int64_t token = at_peak(&row, &second);
    if (reservoir)
        token = inside(&row, &drawn, &logit);
    double log_mass = log(measured->mass), inverse = measured->inverse;
    double gap = ((double)second - row.peak) * inverse;
    asked->tokens[number] = token;
    asked->log_prob[number] = (float)(((double)logit - row.peak) * inverse - log_mass);
    asked->entropy[number] = (float)(log_mass - measured->moment / measured->mass);
    asked->margin[number] = (float)((gap < measured->lowest ? 1 : -expm1(gap)) / measured->mass);
}

/* The rows are taken in turns, so that a thread that waits for a core holds little back. */
struct work {
    const struct request *asked;
    int64_t *next, turn;
    double *scratch;
};

static void *take_rows(void *argument)
{
    const struct work *work = argument;
    const int64_t rows = work->asked->rows;
    for (;;) {
        int64_t first = __atomic_fetch_add(work->next, work->turn, __ATOMIC_RELAXED);
        if (first >= rows)
            return NULL;
        int64_t stop = first + work->turn < rows ? first + work->turn : rows;
        for (int64_t row = first; row < stop; row++)
            onepass_draw_row(work->asked, row, work->scratch);
    }
}

EXPORT int32_t onepass_abi(void)
{
    return ABI;
}

/* Draws every row of a request; 0, or -1 where memory for the tiles is not to be had. */
EXPORT int32_t onepass_draw(const struct request *asked)
{
    int64_t tiles = (asked->columns + asked->tile - 1) / asked->tile;
    int64_t each = (asked->tile + BLOCK - 1) / BLOCK + (2 * asked->tile + tiles + 1) / 2;
    int64_t next = 0, turn = WORK_PER_TURN / asked->columns;
    int64_t threads = asked->rows * asked->columns / WORK_PER_THREAD;
    turn = turn < 1 ? 1 : turn;
    threads = threads > asked->threads ? asked->threads : threads;
    threads = threads > asked->rows ? asked->rows : threads;
    threads = threads > MOST_THREADS ? MOST_THREADS : threads;
    threads = threads < 1 ? 1 : threads;
    double *scratch = malloc(threads * each * sizeof *scratch);
    if (!scratch)
        return -1;
    struct work work[MOST_THREADS];
    pthread_t others[MOST_THREADS];
    int64_t started = 0;
    for (int64_t i = 0; i < threads; i++)
        work[i] = (struct work){asked, &next, turn, scratch + i * each};
    /* Where no more threads are to be had, those that run take all rows. */
    while (started + 1 < threads
           && pthread_create(&others[started], NULL, take_rows, &work[started + 1]) == 0)
        started++;
    take_rows(&work[0]);
    for (int64_t i = 0; i < started; i++)
        pthread_join(others[i], NULL);
    free(scratch);
    return 0;
}
