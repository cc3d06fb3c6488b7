/* A part of a JPEG, with the same pixels as if all of it were decoded: libjpeg-turbo's jpeg_skip_scanlines and
   jpeg_crop_scanline leave out the waves and the colours of what lies beside the part. Optional: without a compiler or
   without libjpeg-turbo's headers, jpeg.py has the whole picture decoded and takes the part. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000003
#error "a libjpeg that cannot decode parts, or that rounds in another way than those of today"
#endif

#define BESIDE 8 /* pixels left and right of the part, from which its colours are interpolated */

struct failure {
    struct jpeg_error_mgr standard; /* libjpeg is given this first field */
    jmp_buf back;
    char message[JMSG_LENGTH_MAX];
};

static void fail(j_common_ptr jpeg)
{
    struct failure *failure = (struct failure *)jpeg->err;
    jpeg->err->format_message(jpeg, failure->message);
    longjmp(failure->back, 1);
}

static void say_nothing(j_common_ptr jpeg) { (void)jpeg; }

/* Is what follows the head one scan and nothing else, up to the end of the file? Whatever else there is, decoders of the whole
   picture may refuse, and would not be asked to. */
static int is_one_scan(const unsigned char *at, const unsigned char *end)
{
    while ((at = memchr(at, 255, (size_t)(end - at))) != NULL && end - at >= 2) {
        if (at[1] == 0xD9) return end - at == 2;
        if (at[1] != 0 && (at[1] < 0xD0 || at[1] > 0xD7)) return 0; /* neither a byte of the scan nor a restart */
        at += 2;
    }
    return 0;
}

struct part { JDIMENSION left, top, width, height; int channels; };

/* Where a part is in memory: its first pixel, and how many bytes from a row to the next. */
struct place { size_t begin, row; };

/* Decode `part` of the `size` bytes of `file` into the `room` bytes of `out`, with what is left and right of it: `BESIDE` and the rest of a
   block (jpeg.py leaves room for 80 pixels); 0, or -1 with a message. */
static int decode_part(const unsigned char *file, size_t size, struct part part, unsigned char *out, size_t room, struct place *place, struct failure *failure)
{
    struct jpeg_decompress_struct jpeg;
    JDIMENSION first, columns;

    memset(&jpeg, 0, sizeof jpeg);
    jpeg.err = jpeg_std_error(&failure->standard);
    failure->standard.error_exit = fail;
    failure->standard.output_message = say_nothing;
    if (setjmp(failure->back)) {
        jpeg_destroy_decompress(&jpeg);
        return -1;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, (unsigned char *)file, (unsigned long)size);
    jpeg_read_header(&jpeg, TRUE);
    if (part.left > jpeg.image_width || part.width > jpeg.image_width - part.left ||
        part.top > jpeg.image_height || part.height > jpeg.image_height - part.top) {
        strcpy(failure->message, "the part reaches over the edge of the picture");
        longjmp(failure->back, 1);
    }
    if (!is_one_scan(jpeg.src->next_input_byte, file + size)) {
        strcpy(failure->message, "not one scan up to the end of the file");
        longjmp(failure->back, 1);
    }
    jpeg.out_color_space = part.channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
    jpeg_start_decompress(&jpeg);

    first = part.left > BESIDE ? part.left - BESIDE : 0;
    columns = part.left + part.width + BESIDE;
    columns = (columns < jpeg.output_width ? columns : jpeg.output_width) - first;
    jpeg_crop_scanline(&jpeg, &first, &columns); /* moves `first` to the left, to where a block begins */
    if (part.top) jpeg_skip_scanlines(&jpeg, part.top);
    place->begin = (size_t)(part.left - first) * part.channels;
    place->row = (size_t)jpeg.output_width * part.channels;
    if (part.left < first || part.left + part.width > first + jpeg.output_width || place->row > room / part.height) {
        strcpy(failure->message, "the memory is too small for the part and what is beside it");
        longjmp(failure->back, 1);
    }
    for (JDIMENSION y = 0, n; y < part.height; y += n) {
        JSAMPROW rows[] = {out + y * place->row, out + (y + 1) * place->row}; /* the second one is used only if it is asked for */
        if ((n = jpeg_read_scanlines(&jpeg, rows, y + 1 < part.height ? 2 : 1)) == 0) {
            strcpy(failure->message, "the file ends too early");
            longjmp(failure->back, 1);
        }
    }
    jpeg_destroy_decompress(&jpeg); /* what comes below the part is not read */
    return 0;
}

static PyObject *decode(PyObject *self, PyObject *args)
{
    Py_buffer file, out;
    unsigned int left, top, width, height;
    int channels, failed = 1;
    struct place place = {0, 0};
    struct failure failure = {.message = "channels are 1 or 3, and a part has a height and a width"};
    (void)self;

    if (!PyArg_ParseTuple(args, "y*IIIIiw*", &file, &left, &top, &width, &height, &channels, &out)) return NULL;
    if ((channels == 1 || channels == 3) && width && width <= JPEG_MAX_DIMENSION && height && height <= JPEG_MAX_DIMENSION) {
        struct part part = {left, top, width, height, channels};
        Py_BEGIN_ALLOW_THREADS
        failed = decode_part(file.buf, (size_t)file.len, part, out.buf, (size_t)out.len, &place, &failure);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&file);
    PyBuffer_Release(&out);
    if (failed) return PyErr_Format(PyExc_ValueError, "%s", failure.message);
    return Py_BuildValue("nn", (Py_ssize_t)place.begin, (Py_ssize_t)place.row);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS,
     "decode(file, left, top, width, height, channels, out): a part of a JPEG, and something beside it, into `out`; where its first byte is, and bytes from row to row"},
    {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {
#ifdef Py_MOD_GIL_NOT_USED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg", "A part of a JPEG", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModuleDef_Init(&module); }
