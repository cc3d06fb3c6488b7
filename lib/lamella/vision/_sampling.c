/* Images of bytes, sampled where matrices say: the coordinates of a row, then its pixels, four channels at once. Optional:
   without a compiler that knows vectors (GCC, Clang), sampling.py makes a grid and has PyTorch sample it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "what keeps a place within its image needs numbers that are none"
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a pixel is a number whose lowest byte is the first channel"
#endif

#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wpsabi" /* all functions that take vectors are part of their caller */
#endif

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint32_t numbers4 __attribute__((vector_size(16)));
typedef int32_t integers4 __attribute__((vector_size(16)));
typedef float floats4 __attribute__((vector_size(16)));
typedef float floats8 __attribute__((vector_size(32)));
typedef int32_t integers8 __attribute__((vector_size(32)));

#ifdef __clang__
#define APART(x) __builtin_shufflevector(x, x, 0, 4, 4, 4, 1, 4, 4, 4, 2, 4, 4, 4, 3, 4, 4, 4)
#else
#define APART(x) __builtin_shuffle(x, (bytes16){0, 4, 4, 4, 1, 4, 4, 4, 2, 4, 4, 4, 3, 4, 4, 4})
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

struct task {
    const uint8_t *in;     /* (n, channels, height, width) */
    const double *matrix;  /* (n, 3, 3), from pixels of the result to pixels of the image, both from -1 to 1 */
    float *out;            /* (n, channels, rows, columns) */
    int n, channels, height, width, rows, columns, reflect, align;
};

/* One row of the result: where its pixels come from, and its values. */
struct row { int *at; float *right, *below; floats4 *values; };

/* (channels, height, width) as (height + 1, width + 1), a number a pixel: the last row and column twice, so that each has neighbours. */
INLINE void pack_rows(const struct task *task, const uint8_t *restrict in, uint32_t *restrict packed, int channels)
{
    const size_t width = (size_t)task->width, plane = task->height * width;
    for (int y = 0; y < task->height; y++, in += width, packed += width + 1) {
        for (size_t x = 0; x < width; x++) {
            uint32_t pixel = in[x];
            if (channels > 1) pixel |= (uint32_t)in[plane + x] << 8;
            if (channels > 2) pixel |= (uint32_t)in[2 * plane + x] << 16;
            if (channels > 3) pixel |= (uint32_t)in[3 * plane + x] << 24;
            packed[x] = pixel;
        }
        packed[width] = packed[width - 1];
    }
    memcpy(packed, packed - (width + 1), (width + 1) * sizeof *packed);
}

INLINE void pack(const struct task *task, const uint8_t *in, uint32_t *packed)
{
    if (task->channels == 3) pack_rows(task, in, packed, 3);
    else if (task->channels == 1) pack_rows(task, in, packed, 1);
    else pack_rows(task, in, packed, task->channels);
}

/* `a` times what goes from coordinates (-1 to 1) to pixels, or back. */
static void to_pixels(int n, int align, double *scale, double *shift)
{
    *scale = align ? (n - 1) / 2.0 : n / 2.0;
    *shift = (n - 1) / 2.0;
}

/* The matrix between pixels, counted from 0. */
static void between_pixels(const struct task *task, const double *m, double *p)
{
    double sx, tx, sy, ty, rx, ux, ry, uy, a[9];
    to_pixels(task->columns, task->align, &rx, &ux);
    to_pixels(task->rows, task->align, &ry, &uy);
    for (int i = 0; i < 3; i++) { /* on the right: from pixels of the result */
        a[3 * i] = rx ? m[3 * i] / rx : 0;
        a[3 * i + 1] = ry ? m[3 * i + 1] / ry : 0;
        a[3 * i + 2] = m[3 * i + 2] - (rx ? a[3 * i] * ux : m[3 * i]) - (ry ? a[3 * i + 1] * uy : m[3 * i + 1]);
    }
    to_pixels(task->width, task->align, &sx, &tx);
    to_pixels(task->height, task->align, &sy, &ty);
    for (int j = 0; j < 3; j++) { /* on the left: to pixels of the image */
        p[j] = sx * a[j] + tx * a[6 + j];
        p[3 + j] = sy * a[3 + j] + ty * a[6 + j];
        p[6 + j] = a[6 + j];
    }
}

INLINE floats8 choose(integers8 where, floats8 a, floats8 b) { return (floats8)((where & (integers8)a) | (~where & (integers8)b)); }
INLINE floats8 truncated(floats8 t) { return __builtin_convertvector(__builtin_convertvector(t, integers8), floats8); }

/* Coordinates within an image of `n` pixels; what is no number becomes the edge. */
INLINE floats8 inside(floats8 t, float n, int reflect, int align)
{
    const floats8 zero = {0};
    if (reflect) {
        const float low = align ? 0.0f : 0.5f, twice = align ? 2 * n - 2 : 2 * n, per = twice > 0 ? 1 / twice : 0;
        t = t + low;
        t = choose(t < 0, -t, t);
        t = choose(t < 1e9f, t, zero);
        t = t - twice * truncated(t * per);
        t = choose(t < twice - t, t, twice - t) - low;
    }
    t = choose(t > 0, t, zero);
    return choose(t < n - 1, t, zero + (n - 1));
}

/* For eight pixels at a time, and so perhaps for some that are not there. */
INLINE void find(const struct task *task, const double *p, int y, int reflect, int align, struct row *row)
{
    const floats8 first = {0, 1, 2, 3, 4, 5, 6, 7};
    const float x0 = (float)(p[1] * y + p[2]), y0 = (float)(p[4] * y + p[5]), z0 = (float)(p[7] * y + p[8]);
    const float dx = (float)p[0], dy = (float)p[3], dz = (float)p[6];
    const int line = task->width + 1;
    for (int k = 0; k < task->columns; k += 8) {
        const floats8 x = first + (float)k, over = 1 / (z0 + dz * x);
        const floats8 u = inside((x0 + dx * x) * over, (float)task->width, reflect, align);
        const floats8 v = inside((y0 + dy * x) * over, (float)task->height, reflect, align);
        const integers8 left = __builtin_convertvector(u, integers8), top = __builtin_convertvector(v, integers8), at = top * line + left;
        const floats8 right = u - __builtin_convertvector(left, floats8), below = v - __builtin_convertvector(top, floats8);
        memcpy(row->at + k, &at, sizeof at);
        memcpy(row->right + k, &right, sizeof right);
        memcpy(row->below + k, &below, sizeof below);
    }
}

INLINE floats4 channels_of(uint32_t pixel)
{
    return __builtin_convertvector((integers4)APART((bytes16)(numbers4){pixel}), floats4);
}

INLINE void mix(const struct task *task, const uint32_t *restrict packed, const struct row *row)
{
    const size_t line = (size_t)task->width + 1;
    floats4 *restrict values = row->values;
    for (int k = 0; k < task->columns; k++) {
        const uint32_t *at = packed + row->at[k];
        const floats4 a = channels_of(at[0]), b = channels_of(at[1]), c = channels_of(at[line]), d = channels_of(at[line + 1]);
        const floats4 above = a + (b - a) * row->right[k], under = c + (d - c) * row->right[k];
        values[k] = above + (under - above) * row->below[k];
    }
}

FOR_EACH_PROCESSOR
static void sample_images(const struct task *task, uint32_t *packed, struct row *row)
{
    const size_t image = (size_t)task->channels * task->height * task->width, plane = (size_t)task->rows * task->columns;
    for (int i = 0; i < task->n; i++) {
        double p[9];
        float *out = task->out + i * task->channels * plane;
        between_pixels(task, task->matrix + 9 * i, p);
        pack(task, task->in + i * image, packed);
        for (int y = 0; y < task->rows; y++, out += task->columns) {
            if (task->reflect && task->align) find(task, p, y, 1, 1, row);
            else if (task->reflect) find(task, p, y, 1, 0, row);
            else find(task, p, y, 0, 0, row);
            mix(task, packed, row);
            for (int c = 0; c < task->channels; c++)
                for (int k = 0; k < task->columns; k++) out[c * plane + k] = row->values[k][c];
        }
    }
}

/* The memory of a row and of a packed image, and the work; 0, or -1 if there is no memory. */
static int run(const struct task *task)
{
    const size_t columns = (size_t)task->columns + 8;
    uint32_t *packed = malloc(((size_t)task->height + 1) * ((size_t)task->width + 1) * sizeof *packed);
    struct row row = {malloc(columns * sizeof(int)), malloc(columns * sizeof(float)), malloc(columns * sizeof(float)), malloc(columns * sizeof(floats4))};
    const int failed = !packed || !row.at || !row.right || !row.below || !row.values;
    if (!failed) sample_images(task, packed, &row);
    free(packed); free(row.at); free(row.right); free(row.below); free(row.values);
    return failed ? -1 : 0;
}

/* Do the sizes fit together, and into the numbers of this file? */
static int fits(const struct task *task, Py_ssize_t in, Py_ssize_t matrix, Py_ssize_t out)
{
    const Py_ssize_t most = 1 << 15;
    const int sides[] = {task->height, task->width, task->rows, task->columns};
    for (int k = 0; k < 4; k++) if (sides[k] < 1 || sides[k] >= most) return 0;
    if (task->channels < 1 || task->channels > 4 || task->n < 0 || task->n > 1 << 20) return 0;
    return in == (Py_ssize_t)task->n * task->channels * task->height * task->width && matrix == (Py_ssize_t)task->n * 9 * (Py_ssize_t)sizeof(double) &&
           out == (Py_ssize_t)task->n * task->channels * task->rows * task->columns * (Py_ssize_t)sizeof(float);
}

static PyObject *sample(PyObject *self, PyObject *args)
{
    Py_buffer in, matrix, out;
    struct task task;
    int failed = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*(iiii)y*w*(ii)pp", &in, &task.n, &task.channels, &task.height, &task.width, &matrix, &out, &task.rows, &task.columns, &task.reflect, &task.align)) return NULL;
    if (fits(&task, in.len, matrix.len, out.len)) {
        task.in = in.buf, task.matrix = matrix.buf, task.out = out.buf;
        Py_BEGIN_ALLOW_THREADS
        failed = run(&task);
        Py_END_ALLOW_THREADS
        if (failed) PyErr_NoMemory();
    } else PyErr_SetString(PyExc_ValueError, "sizes that do not fit together, or are too large");
    PyBuffer_Release(&in);
    PyBuffer_Release(&matrix);
    PyBuffer_Release(&out);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"sample", sample, METH_VARARGS,
     "sample(images, (n, channels, height, width), matrices, out, (height, width), reflect, align): bytes and (n, 3, 3) doubles to floats, bilinear"},
    {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {
#ifdef Py_MOD_GIL_NOT_USED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sampling", "Images sampled where matrices say", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__sampling(void) { return PyModuleDef_Init(&module); }
