/* What a CPU does to every value of an activation, in one pass over memory each. `kernels.py` calls it, and says what
   goes in and out. A library without anything of Python: a compiler is enough.

   Plain loops that compilers vectorise. Sums are in the order that is written here, so that they are the same bits on
   every processor. Callers see to it that the memory is there: nothing is checked. A function whose arguments change
   gets another name, as an old build may lie beside a new kernels.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Two copies of a function, of which the loader takes the one for this processor. AVX-512 is no faster here. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("default", "avx2")))
#endif
#endif
#ifndef FOR_EVERY_PROCESSOR
#define FOR_EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))
#define LEAST(a, b) ((a) < (b) ? (a) : (b))

/* ------------------------------------------------------------------------------------------------------- moments */

enum { CHANNELS = 64, POSITIONS = 16, ROWS = 1024 };

typedef struct {
    double *sums, *peaks;                  /* (images, channels) */
    double *squares, *low, *zeros, *near;  /* (channels,) */
} Moments;

/* The same of values that lie side by side, each with the rows below it. */
typedef struct {
    double sums[CHANNELS], squares[CHANNELS];
    float low[CHANNELS], high[CHANNELS];
    int32_t zeros[CHANNELS], near[CHANNELS];
} Lanes;

INLINE void clear(Lanes *lanes, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        lanes->sums[i] = lanes->squares[i] = 0;
        lanes->low[i] = INFINITY;
        lanes->high[i] = -INFINITY;
        lanes->zeros[i] = lanes->near[i] = 0;
    }
}

INLINE float value_at(const void *x, int64_t i, int bfloat16) {
    if (!bfloat16) return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void add(Lanes *lanes, const void *x, int bfloat16, int64_t at, int64_t n, int64_t rows, int64_t step,
                const double *shift, float near_zero) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < n; i++) {
            float value = value_at(x, at + row * step + i, bfloat16);
            double off = shift ? value - shift[i] : value;
            lanes->sums[i] += off;
            lanes->squares[i] += off * off;
            lanes->low[i] = value < lanes->low[i] ? value : lanes->low[i];
            lanes->high[i] = value > lanes->high[i] ? value : lanes->high[i];
            lanes->zeros[i] += value == 0;
            lanes->near[i] += fabsf(value) <= near_zero;
        }
}

INLINE void put(Moments to, int64_t map, int64_t channel, const Lanes *lanes, int64_t i) {
    to.sums[map] += lanes->sums[i];
    to.squares[channel] += lanes->squares[i];
    to.zeros[channel] += lanes->zeros[i];
    to.near[channel] += lanes->near[i];
    if (lanes->low[i] < to.low[channel]) to.low[channel] = lanes->low[i];
    if (lanes->high[i] > to.peaks[map]) to.peaks[map] = lanes->high[i];
}

/* Channels lie side by side. */
INLINE void of_pixels(const void *x, int bfloat16, int64_t images, int64_t channels, int64_t positions,
                      int64_t image_step, int64_t step, const double *shift, float near_zero, Moments to) {
    Lanes lanes;
    for (int64_t image = 0; image < images; image++)
        for (int64_t channel = 0; channel < channels; channel += CHANNELS)
            for (int64_t position = 0; position < positions; position += ROWS) {
                int64_t n = LEAST(channels - channel, CHANNELS), rows = LEAST(positions - position, ROWS);
                int64_t at = image * image_step + position * step + channel;
                const double *shifts = shift ? shift + channel : 0;
                clear(&lanes, n);
                if (n == CHANNELS) /* a number that the compiler knows */
                    add(&lanes, x, bfloat16, at, CHANNELS, rows, step, shifts, near_zero);
                else
                    add(&lanes, x, bfloat16, at, n, rows, step, shifts, near_zero);
                for (int64_t i = 0; i < n; i++)
                    put(to, image * channels + channel + i, channel + i, &lanes, i);
            }
}

/* The positions of a channel lie side by side. */
INLINE void of_maps(const void *x, int bfloat16, int64_t images, int64_t channels, int64_t positions,
                    int64_t image_step, int64_t step, const double *shift, float near_zero, Moments to) {
    Lanes lanes;
    double shifts[POSITIONS];
    for (int64_t image = 0; image < images; image++)
        for (int64_t channel = 0; channel < channels; channel++) {
            for (int64_t i = 0; shift && i < POSITIONS; i++) shifts[i] = shift[channel];
            for (int64_t position = 0; position < positions; position += POSITIONS * ROWS) {
                int64_t n = LEAST(positions - position, POSITIONS * ROWS), rows = n / POSITIONS;
                int64_t at = image * image_step + channel * step + position;
                clear(&lanes, POSITIONS);
                add(&lanes, x, bfloat16, at, POSITIONS, rows, POSITIONS, shift ? shifts : 0, near_zero);
                at += rows * POSITIONS;
                add(&lanes, x, bfloat16, at, n % POSITIONS, 1, 0, shift ? shifts : 0, near_zero);
                for (int64_t i = 0; i < POSITIONS; i++)
                    put(to, image * channels + channel, channel, &lanes, i);
            }
        }
}

FOR_EVERY_PROCESSOR void fmextract_moments(
    const void *x, int bfloat16, int64_t images, int64_t channels, int64_t positions, int64_t image_step,
    int64_t channel_step, int64_t position_step, const double *shift, float near_zero, double *sums, double *peaks,
    double *squares, double *low, double *zeros, double *near) {
    Moments to = {sums, peaks, squares, low, zeros, near};
#define WITH(OF, BFLOAT16, STEP, SHIFT) \
    OF(x, BFLOAT16, images, channels, positions, image_step, STEP, SHIFT, near_zero, to)
#define OF_EITHER(OF, STEP)                              \
    if (bfloat16 && shift) WITH(OF, 1, STEP, shift);     \
    else if (bfloat16) WITH(OF, 1, STEP, 0);             \
    else if (shift) WITH(OF, 0, STEP, shift);            \
    else WITH(OF, 0, STEP, 0)
    if (channel_step == 1) {
        OF_EITHER(of_pixels, position_step);
    } else {
        OF_EITHER(of_maps, channel_step);
    }
}

/* -------------------------------------------------------------------------------------------------------- places */

/* Where a map first holds a value. */
INLINE int64_t place_of(double value, const void *x, int bfloat16, int64_t at, int64_t positions, int64_t step) {
    for (int64_t position = 0; position < positions; position++)
        if (value_at(x, at + position * step, bfloat16) == value) return position;
    return 0;
}

void fmextract_places(const void *x, int bfloat16, int64_t positions, int64_t step, int64_t n, const int64_t *starts,
                      const double *values, int64_t *places) {
    for (int64_t i = 0; i < n; i++)
        places[i] = bfloat16 ? place_of(values[i], x, 1, starts[i], positions, step)
                             : place_of(values[i], x, 0, starts[i], positions, step);
}

/* --------------------------------------------------------------------------------------------------- byte planes */

enum { SIDE = 64 };

INLINE void copy(uint8_t *to, const uint8_t *from, int64_t n) {
    if (n == SIDE)
        memcpy(to, from, SIDE); /* no call of a function */
    else
        memcpy(to, from, n);
}

FOR_EVERY_PROCESSOR void fmextract_planes(
    const uint8_t *x, int64_t images, int64_t channels, int64_t positions, int64_t itemsize, int64_t image_step,
    int64_t position_step, uint8_t *planes, int64_t plane_step) {
    uint8_t tiles[2][SIDE * SIDE];
    int64_t width = channels * itemsize;
    for (int64_t image = 0; image < images; image++)
        for (int64_t position = 0; position < positions; position += SIDE)
            for (int64_t column = 0; column < width; column += SIDE) {
                int64_t columns = LEAST(width - column, SIDE), rows = LEAST(positions - position, SIDE);
                const uint8_t *from = x + image * image_step + position * position_step + column;
                for (int64_t row = 0; row < rows; row++)
                    copy(tiles[0] + row * SIDE, from + row * position_step, columns);
                /* Each turn puts the lower half of the rows between those of the upper one, byte by byte; after six the
                   64 rows have become columns. */
                for (int turn = 0, half = SIDE * SIDE / 2; turn < 6; turn++) {
                    const uint8_t *restrict in = tiles[turn % 2];
                    uint8_t *restrict out = tiles[1 - turn % 2];
                    for (int i = 0; i < half; i++) {
                        out[2 * i] = in[i];
                        out[2 * i + 1] = in[half + i];
                    }
                }
                uint8_t *to = planes + (image * channels + column / itemsize) * positions + position;
                for (int64_t i = 0; i < columns; i += itemsize, to += positions)
                    for (int64_t plane = 0; plane < itemsize; plane++)
                        copy(to + plane * plane_step, tiles[0] + (i + plane) * SIDE, rows);
            }
}
