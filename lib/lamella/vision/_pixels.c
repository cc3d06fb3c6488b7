/* What PyTorch does to the bytes of pictures, with the same results bit by bit, in fewer passes over the memory: colours resized
   from (height, width, 3) to planes, and bytes to floats. Optional: without GCC or Clang on an x86 processor, or without AVX2 in
   it, decoding.py and pixels.py have PyTorch and NumPy do it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__) || !defined(__x86_64__)
#error "only for GCC and Clang on x86"
#endif

#define AVX2 __attribute__((target("avx2")))
#define INLINE AVX2 static inline __attribute__((always_inline))
#define ROWS 4   /* are resized at the same time */
#define BEHIND 64 /* bytes that may be read or written behind a row */

/* One side of a picture: each of `out` pixels is a sum of `taps` of the `in` there are, from `first` on; the weights are whole
   numbers, of which `2^bits` are one. As PyTorch has them (UpSampleKernel.cpp, `_compute_index_ranges_int16_weights`). */
struct axis { int in, out, taps, bits, *first; int16_t *weight; };

/* The weights of pixel `i`: a triangle as wide as a pixel of the result, but at least as one of the picture; returns how many. */
static int weigh(const struct axis *axis, int i, int *first, double *weight)
{
    const double scale = (double)axis->in / axis->out, reach = scale >= 1 ? scale : 1, per = 1 / reach, middle = scale * (i + 0.5);
    const int low = (int)(middle - reach + 0.5), high = (int)(middle + reach + 0.5);
    double total = 0;
    *first = low > 0 ? low : 0;
    const int count = (high < axis->in ? high : axis->in) - *first;
    for (int k = 0; k < count; k++) {
        const double far = fabs((k + *first - middle + 0.5) * per);
        total += weight[k] = far < 1 ? 1 - far : 0;
    }
    for (int k = 0; k < count; k++) weight[k] /= total;
    return count;
}

/* `exact` has zeros, `room` for each pixel; 0, or -1 if there is no memory. */
static int measure(struct axis *axis, double *exact, int room)
{
    double highest = 0;
    for (int i = 0; i < axis->out; i++) {
        const int count = weigh(axis, i, axis->first + i, exact + (size_t)i * room);
        if (count > axis->taps) axis->taps = count;
        for (int k = 0; k < count; k++) if (exact[(size_t)i * room + k] > highest) highest = exact[(size_t)i * room + k];
    }
    axis->taps = (axis->taps + 3) / 4 * 4;
    while (axis->bits < 22 && (int)(0.5 + highest * (1 << (axis->bits + 1))) < 1 << 15) axis->bits++;
    axis->weight = malloc((size_t)axis->out * axis->taps * sizeof *axis->weight);
    for (int i = 0; axis->weight && i < axis->out; i++)
        for (int k = 0; k < axis->taps; k++) axis->weight[(size_t)i * axis->taps + k] = (int16_t)(0.5 + exact[(size_t)i * room + k] * (1 << axis->bits));
    return axis->weight ? 0 : -1;
}

static int make_axis(struct axis *axis, int in, int out)
{
    const int room = 2 * (in / out + 1) + 4; /* no fewer than the taps */
    double *exact = calloc((size_t)out * room, sizeof *exact);
    *axis = (struct axis){in, out, 0, 0, malloc((size_t)out * sizeof *axis->first), NULL};
    const int failed = !exact || !axis->first || measure(axis, exact, room);
    free(exact);
    return failed ? -1 : 0;
}

static void drop_axis(struct axis *axis) { free(axis->first); free(axis->weight); }

INLINE __m256i two_halves(const uint8_t *a, const uint8_t *b)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a)), _mm_loadu_si128((const __m128i *)b), 1);
}

INLINE __m256i two_weights(const int16_t *weight)
{
    int32_t two;
    memcpy(&two, weight, sizeof two);
    return _mm256_set1_epi32(two);
}

INLINE __m256i add_products(__m256i sum, __m256i values, __m256i weights) { return _mm256_add_epi32(sum, _mm256_madd_epi16(values, weights)); }
INLINE void put(uint8_t *out, int pixel) { memcpy(out, &pixel, sizeof pixel); } /* and a byte more, which the next pixel overwrites */

/* Four rows, `from` bytes apart, become as wide as the result, `to` bytes apart; each half of a vector has one row. */
INLINE void narrow_rows(const struct axis *axis, int groups, const uint8_t *in, size_t from, uint8_t *out, size_t to)
{
    const __m256i pixels01 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i pixels23 = _mm256_broadcastsi128_si256(_mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    const __m256i half = _mm256_set1_epi32(1 << (axis->bits - 1));
    const __m128i bits = _mm_cvtsi32_si128(axis->bits);
    const int16_t *weight = axis->weight;
    for (int i = 0; i < axis->out; i++, out += 3) {
        const uint8_t *at = in + 3 * (size_t)axis->first[i];
        __m256i a = half, b = half;
        for (int g = 0; g < groups; g++, weight += 4, at += 12) {
            const __m256i x = two_halves(at, at + from), y = two_halves(at + 2 * from, at + 3 * from);
            const __m256i w01 = two_weights(weight), w23 = two_weights(weight + 2);
            a = add_products(add_products(a, _mm256_shuffle_epi8(x, pixels01), w01), _mm256_shuffle_epi8(x, pixels23), w23);
            b = add_products(add_products(b, _mm256_shuffle_epi8(y, pixels01), w01), _mm256_shuffle_epi8(y, pixels23), w23);
        }
        a = _mm256_packs_epi32(_mm256_sra_epi32(a, bits), _mm256_sra_epi32(b, bits));
        a = _mm256_packus_epi16(a, a);
        put(out, _mm_cvtsi128_si32(_mm256_castsi256_si128(a)));
        put(out + to, _mm_cvtsi128_si32(_mm256_extracti128_si256(a, 1)));
        put(out + 2 * to, _mm_extract_epi32(_mm256_castsi256_si128(a), 1));
        put(out + 3 * to, _mm_extract_epi32(_mm256_extracti128_si256(a, 1), 1));
    }
}

AVX2 static void narrow_four(const struct axis *axis, const uint8_t *in, size_t from, uint8_t *out, size_t to)
{
    if (axis->taps == 4) narrow_rows(axis, 1, in, from, out, to);
    else narrow_rows(axis, axis->taps / 4, in, from, out, to);
}

/* One row of the result: the sum of `taps` rows, `from` bytes apart. */
AVX2 static void sum_rows(const int16_t *weight, const struct axis *axis, const uint8_t *in, size_t from, uint8_t *out, size_t n)
{
    const __m256i half = _mm256_set1_epi32(1 << (axis->bits - 1)), zero = _mm256_setzero_si256();
    const __m128i bits = _mm_cvtsi32_si128(axis->bits);
    for (size_t x = 0; x < n; x += 32) {
        __m256i a = half, b = half, c = half, d = half;
        const uint8_t *at = in + x;
        for (int k = 0; k < axis->taps; k += 2, at += 2 * from) {
            const __m256i w = two_weights(weight + k), one = _mm256_loadu_si256((const __m256i *)at), two = _mm256_loadu_si256((const __m256i *)(at + from));
            const __m256i low = _mm256_unpacklo_epi8(one, two), high = _mm256_unpackhi_epi8(one, two);
            a = add_products(a, _mm256_unpacklo_epi8(low, zero), w);
            b = add_products(b, _mm256_unpackhi_epi8(low, zero), w);
            c = add_products(c, _mm256_unpacklo_epi8(high, zero), w);
            d = add_products(d, _mm256_unpackhi_epi8(high, zero), w);
        }
        a = _mm256_packs_epi32(_mm256_sra_epi32(a, bits), _mm256_sra_epi32(b, bits));
        c = _mm256_packs_epi32(_mm256_sra_epi32(c, bits), _mm256_sra_epi32(d, bits));
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_packus_epi16(a, c));
    }
}

/* One channel of 16 pixels, which lie in three vectors. */
INLINE void put_channel(uint8_t *out, __m128i a, __m128i b, __m128i c, __m128i from_a, __m128i from_b, __m128i from_c)
{
    const __m128i found = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, from_a), _mm_shuffle_epi8(b, from_b)), _mm_shuffle_epi8(c, from_c));
    _mm_storeu_si128((__m128i *)out, found);
}

/* A row of pixels becomes a row of each plane. */
AVX2 static void split_channels(const uint8_t *in, int n, uint8_t *out, size_t plane)
{
    int x = 0;
    for (; x + 16 <= n; x += 16) {
        const __m128i *at = (const __m128i *)(in + 3 * x);
        const __m128i a = _mm_loadu_si128(at), b = _mm_loadu_si128(at + 1), c = _mm_loadu_si128(at + 2);
        put_channel(out + x, a, b, c, _mm_setr_epi8(0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1),
                    _mm_setr_epi8(-1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14, -1, -1, -1, -1, -1), _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1, 4, 7, 10, 13));
        put_channel(out + plane + x, a, b, c, _mm_setr_epi8(1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1),
                    _mm_setr_epi8(-1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1), _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14));
        put_channel(out + 2 * plane + x, a, b, c, _mm_setr_epi8(2, 5, 8, 11, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1),
                    _mm_setr_epi8(-1, -1, -1, -1, -1, 1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1), _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15));
    }
    for (; x < n; x++) for (int c = 0; c < 3; c++) out[c * plane + x] = in[3 * x + c];
}

struct picture { const uint8_t *in; int height, width; size_t stride; uint8_t *out; int rows, columns; };

/* All rows of a picture as wide as the result. What lies behind a row is read, too, and has the weight 0; but behind the last ones it may not
   be ours to read, so they are copied first. */
static void narrow_all(const struct picture *picture, const struct axis *wide, uint8_t *narrow, size_t line, uint8_t *last, size_t last_line)
{
    const size_t row = 3 * (size_t)picture->width, end = (picture->height - 1) * picture->stride + row, read = row + 3 * (size_t)wide->taps + 4;
    int y = 0;
    for (; (y + ROWS - 1) * picture->stride + read <= end; y += ROWS) narrow_four(wide, picture->in + y * picture->stride, picture->stride, narrow + y * line, line);
    for (; y < picture->height; y += ROWS) {
        for (int k = 0; k < ROWS && y + k < picture->height; k++) memcpy(last + k * last_line, picture->in + (y + k) * picture->stride, row);
        narrow_four(wide, last, last_line, narrow + y * line, line);
    }
}

/* 0, or -1 if there is no memory. */
static int resize_picture(const struct picture *picture)
{
    const size_t line = 3 * (size_t)picture->columns + BEHIND, plane = (size_t)picture->rows * picture->columns;
    size_t last_line;
    struct axis wide = {0}, tall = {0};
    uint8_t *narrow = NULL, *last = NULL, *row = NULL;
    int failed = make_axis(&wide, picture->width, picture->columns) || make_axis(&tall, picture->height, picture->rows);
    last_line = 3 * ((size_t)picture->width + wide.taps) + BEHIND;
    if (!failed) {
        narrow = malloc(((size_t)picture->height + ROWS + tall.taps) * line); /* more rows than there are: their weights are 0 */
        last = calloc(ROWS, last_line);
        row = malloc(line);
        failed = !narrow || !last || !row;
    }
    if (!failed) {
        narrow_all(picture, &wide, narrow, line, last, last_line);
        for (int i = 0; i < tall.out; i++) {
            sum_rows(tall.weight + (size_t)i * tall.taps, &tall, narrow + tall.first[i] * line, line, row, line - BEHIND);
            split_channels(row, picture->columns, picture->out + (size_t)i * picture->columns, plane);
        }
    }
    free(narrow); free(last); free(row);
    drop_axis(&wide); drop_axis(&tall);
    return failed ? -1 : 0;
}

/* Do the two buffers hold what `resize` is for, and sizes that fit into the numbers of this file? */
static int is_picture(const Py_buffer *in, const Py_buffer *out, struct picture *picture)
{
    const Py_ssize_t most = 1 << 20;
    if (strcmp(in->format, "B") || strcmp(out->format, "B")) return 0;
    if (in->ndim != 3 || in->shape[2] != 3 || in->strides[2] != 1 || (in->shape[1] > 1 && in->strides[1] != 3)) return 0;
    if (out->ndim != 3 || out->shape[0] != 3) return 0;
    for (int k = 0; k < 2; k++) if (in->shape[k] < 1 || in->shape[k] > most || out->shape[k + 1] < 1 || out->shape[k + 1] > most) return 0;
    if (in->shape[0] > 1 && in->strides[0] < 3 * in->shape[1]) return 0;
    *picture = (struct picture){in->buf, (int)in->shape[0], (int)in->shape[1], in->shape[0] > 1 ? (size_t)in->strides[0] : 3 * (size_t)in->shape[1],
                                out->buf, (int)out->shape[1], (int)out->shape[2]};
    return 1;
}

static PyObject *resize(PyObject *self, PyObject *args)
{
    PyObject *from, *to;
    Py_buffer in, out;
    struct picture picture;
    int failed = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", &from, &to) || PyObject_GetBuffer(from, &in, PyBUF_STRIDES | PyBUF_FORMAT)) return NULL;
    if (PyObject_GetBuffer(to, &out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE | PyBUF_FORMAT)) {
        PyBuffer_Release(&in);
        return NULL;
    }
    if (is_picture(&in, &out, &picture)) {
        Py_BEGIN_ALLOW_THREADS
        failed = resize_picture(&picture);
        Py_END_ALLOW_THREADS
        if (failed) PyErr_NoMemory();
    } else PyErr_SetString(PyExc_ValueError, "these are no bytes (height, width, 3) and (3, rows, columns)");
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

/* `n` bytes to floats: times `scale`, then plus `shift`, each rounded. Past the caches: nobody reads them before the whole batch is done. */
AVX2 static void to_floats(const uint8_t *in, float *out, size_t n, float scale, float shift)
{
    const __m256 scales = _mm256_set1_ps(scale), shifts = _mm256_set1_ps(shift);
    size_t k = 0;
    for (; k < n && (uintptr_t)(out + k) % 32; k++) {
        const float product = in[k] * scale;
        out[k] = product + shift;
    }
    for (; k + 8 <= n; k += 8) {
        const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(in + k))));
        _mm256_stream_ps(out + k, _mm256_add_ps(_mm256_mul_ps(values, scales), shifts));
    }
    for (; k < n; k++) {
        const float product = in[k] * scale;
        out[k] = product + shift;
    }
}

static PyObject *floats(PyObject *self, PyObject *args)
{
    Py_buffer in, scale, shift, out;
    int fits;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*y*w*", &in, &scale, &shift, &out)) return NULL;
    const Py_ssize_t planes = scale.len / (Py_ssize_t)sizeof(float), size = planes ? in.len / planes : 0;
    fits = scale.len == shift.len && scale.len == planes * (Py_ssize_t)sizeof(float) && in.len == planes * size && out.len == in.len * (Py_ssize_t)sizeof(float);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t k = 0; k < planes; k++)
            to_floats((const uint8_t *)in.buf + k * size, (float *)out.buf + k * size, (size_t)size, ((const float *)scale.buf)[k], ((const float *)shift.buf)[k]);
        _mm_sfence();
        Py_END_ALLOW_THREADS
    } else PyErr_SetString(PyExc_ValueError, "sizes that do not fit together");
    PyBuffer_Release(&in);
    PyBuffer_Release(&scale);
    PyBuffer_Release(&shift);
    PyBuffer_Release(&out);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"resize", resize, METH_VARARGS, "resize(bytes (height, width, 3), memory for bytes (3, rows, columns)): bilinear, averaging over all pixels that a new one covers"},
    {"floats", floats, METH_VARARGS, "floats(bytes, factors of equal parts of them, what is added, memory for as many floats)"},
    {NULL, NULL, 0, NULL}};

static int begin(PyObject *module)
{
    (void)module;
    if (__builtin_cpu_supports("avx2")) return 0;
    PyErr_SetString(PyExc_ImportError, "this processor has no AVX2");
    return -1;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, begin},
#ifdef Py_MOD_GIL_NOT_USED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pixels", "Bytes of pictures, resized and as floats", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pixels(void) { return PyModuleDef_Init(&module); }
