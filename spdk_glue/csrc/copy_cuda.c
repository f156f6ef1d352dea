/* SPDX-License-Identifier: Apache-2.0 */
/* A copier: one CUDA device, two streams, pinned host memory, and copies between the two. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "copier_cuda.h"

static _Thread_local char error_text[160];
static _Thread_local cu_result error_code;

const char *glue_copier_error(void)
{
    return error_text;
}

uint32_t cuda_last_error(void)
{
    return (uint32_t)error_code;
}

const char *glue_copier_error_name(const glue_copier *copier, uint32_t error)
{
    const char *name = NULL;
    if (copier->driver.error_name((cu_result)error, &name) || !name)
        return "an error without a name";
    return name;
}

void cuda_explain(const char *text)
{
    snprintf(error_text, sizeof error_text, "%s", text);
}

int cuda_check(const glue_copier *copier, enum cuda_call call, cu_result result)
{
    if (result == CU_SUCCESS)
        return 0;
    error_code = result;
    const char *name = glue_copier_error_name(copier, (uint32_t)result);
    snprintf(error_text, sizeof error_text, "%s answered %s (%d)", cuda_call_name(call), name, result);
    return cuda_errno(result);
}

/* the context ---------------------------------------------------------------------------------- */

static int push_context(glue_copier *copier)
{
    return CHECKED(copier, context_push, copier->context);
}

/* Whatever the thread used before is current again. */
static void pop_context(glue_copier *copier)
{
    cu_context popped;
    copier->driver.context_pop(&popped);
}

int copier_enter(glue_copier *copier)
{
    pthread_mutex_lock(&copier->lock);
    int error = copier->closed ? -ESHUTDOWN : push_context(copier);
    if (!error)
        return 0;
    if (copier->closed)
        cuda_explain("the copier is closed");
    pthread_mutex_unlock(&copier->lock);
    return error;
}

void copier_leave(glue_copier *copier)
{
    pop_context(copier);
    pthread_mutex_unlock(&copier->lock);
}

/* open, close ---------------------------------------------------------------------------------- */

static int read_attributes(glue_copier *copier)
{
    int pitch = 0, integrated = 0, host_pointer = 0;
    int error = CHECKED(copier, device_attribute, &pitch, CU_ATTRIBUTE_MAX_PITCH, copier->device);
    if (!error)
        error = CHECKED(copier, device_attribute, &integrated, CU_ATTRIBUTE_INTEGRATED, copier->device);
    if (!error)
        error = CHECKED(copier, device_attribute, &host_pointer, CU_ATTRIBUTE_HOST_POINTER, copier->device);
    if (!error)
        error = CHECKED(copier, device_name, copier->gpu.name, (int)sizeof copier->gpu.name, copier->device);
    copier->max_pitch = (size_t)pitch;
    copier->gpu.integrated = integrated != 0;
    copier->gpu.host_pointers = host_pointer != 0;
    return error;
}

static void destroy_streams(glue_copier *copier)
{
    for (int i = 0; i < 2; i++) {
        if (copier->streams[i])
            copier->driver.stream_destroy(copier->streams[i]);
        copier->streams[i] = NULL;
    }
}

/* Non-blocking: no order with the default stream but what events ask for. */
static int make_streams(glue_copier *copier)
{
    int error = push_context(copier);
    if (error)
        return error;
    for (int i = 0; i < 2 && !error; i++)
        error = CHECKED(copier, stream_create, &copier->streams[i], CU_STREAM_NON_BLOCKING);
    if (error)
        destroy_streams(copier);
    pop_context(copier);
    return error;
}

static int open_device(glue_copier *copier, int ordinal)
{
    int error = CHECKED(copier, init, 0);
    if (!error)
        error = CHECKED(copier, device_get, &copier->device, ordinal);
    if (!error)
        error = read_attributes(copier);
    if (!error)
        error = CHECKED(copier, context_retain, &copier->context, copier->device);
    if (error)
        return error;
    error = make_streams(copier);
    if (error)
        copier->driver.context_release(copier->device);
    return error;
}

glue_copier *glue_copier_open(const char *library, int ordinal, int *error)
{
    glue_copier *copier = calloc(1, sizeof *copier);
    if (!copier) {
        *error = -ENOMEM;
        return NULL;
    }
    copier->refs = 1;
    pthread_mutex_init(&copier->lock, NULL);
    cuda_explain("no CUDA driver (libcuda.so.1) was found");
    *error = cuda_driver_open(&copier->driver, library);
    if (!*error)
        *error = open_device(copier, ordinal);
    if (!*error)
        return copier;
    copier->closed = 1;
    glue_copier_release(copier);
    return NULL;
}

void copier_ref(glue_copier *copier)
{
    pthread_mutex_lock(&copier->lock);
    copier->refs++;
    pthread_mutex_unlock(&copier->lock);
}

void glue_copier_release(glue_copier *copier)
{
    pthread_mutex_lock(&copier->lock);
    uint32_t left = --copier->refs;
    pthread_mutex_unlock(&copier->lock);
    if (left)
        return;
    while (copier->events) {
        glue_event *event = copier->events;
        copier->events = event->next;
        free(event);
    }
    pthread_mutex_destroy(&copier->lock);
    free(copier->ranges);
    free(copier);
}

void glue_copier_gpu(const glue_copier *copier, glue_gpu *out)
{
    *out = copier->gpu;
}

uint64_t glue_copier_stream(const glue_copier *copier, int which)
{
    return (uint64_t)(uintptr_t)copier->streams[which];
}

void glue_copier_counts(glue_copier *copier, uint32_t *events, uint64_t *registered)
{
    pthread_mutex_lock(&copier->lock);
    *events = copier->live_events;
    *registered = 0;
    for (uint32_t i = 0; i < copier->num_ranges; i++)
        *registered += copier->ranges[i].bytes;
    pthread_mutex_unlock(&copier->lock);
}

int glue_copier_close(glue_copier *copier, uint32_t timeout_ms)
{
    int error = copier_enter(copier);
    if (error)
        return copier->closed ? 0 : -EBUSY;
    copier->closed = 1;
    pthread_mutex_unlock(&copier->lock);
    error = copier_drain(copier, timeout_ms);
    pthread_mutex_lock(&copier->lock);
    if (!error)
        error = copier_unpin(copier, 0, 1);
    if (!error) {
        events_destroy(copier);
        destroy_streams(copier);
    }
    copier_leave(copier);
    if (!error)
        copier->driver.context_release(copier->device);
    return error ? -EBUSY : 0;
}

/* copies --------------------------------------------------------------------------------------- */

struct rectangle {
    uint64_t host, host_pitch, device, device_pitch, width, height;
};

static int copy_line(glue_copier *copier, int direction, cu_stream stream, struct rectangle of)
{
    void *host = (void *)(uintptr_t)of.host;
    if (direction == GLUE_TO_DEVICE)
        return CHECKED(copier, copy_in, of.device, host, (size_t)of.width, stream);
    return CHECKED(copier, copy_out, host, of.device, (size_t)of.width, stream);
}

static int copy_rows(glue_copier *copier, int direction, cu_stream stream, struct rectangle of)
{
    int error = 0;
    for (uint64_t row = 0; row < of.height && !error; row++) {
        error = copy_line(copier, direction, stream, of);
        of.host += of.host_pitch;
        of.device += of.device_pitch;
    }
    return error;
}

static int copy_rectangle(glue_copier *copier, int direction, cu_stream stream, struct rectangle of)
{
    if (of.host_pitch == of.width && of.device_pitch == of.width) {
        of.width *= of.height;
        of.height = 1;
    }
    uint64_t least = of.host_pitch < of.device_pitch ? of.host_pitch : of.device_pitch;
    uint64_t most = of.host_pitch > of.device_pitch ? of.host_pitch : of.device_pitch;
    if (of.height == 1 || least < of.width || most > copier->max_pitch)
        return copy_rows(copier, direction, stream, of);
    cu_copy_2d copy = {.width = of.width, .height = of.height};
    copy.src_type = direction == GLUE_TO_DEVICE ? CU_MEMORY_HOST : CU_MEMORY_DEVICE;
    copy.dst_type = direction == GLUE_TO_DEVICE ? CU_MEMORY_DEVICE : CU_MEMORY_HOST;
    copy.src_host = copy.dst_host = (void *)(uintptr_t)of.host;
    copy.src_device = copy.dst_device = of.device;
    copy.src_pitch = direction == GLUE_TO_DEVICE ? of.host_pitch : of.device_pitch;
    copy.dst_pitch = direction == GLUE_TO_DEVICE ? of.device_pitch : of.host_pitch;
    return CHECKED(copier, copy_2d, &copy, stream);
}

/* What of [begin, begin + bytes) is one rectangle: part of a run, whole runs of a block, or whole blocks
 * whose runs follow one another in both memories. Returns its bytes. */
static uint64_t next_rectangle(const glue_piece *piece, const glue_device_piece *device, uint64_t begin,
                               uint64_t bytes, struct rectangle *out)
{
    uint64_t run = piece->run_bytes, whole = run * piece->heads;
    uint64_t block = begin / whole, head = begin % whole / run, inside = begin % run;
    *out = (struct rectangle){
        .host = piece->address + block * piece->block_stride + head * piece->head_stride + inside,
        .device = device->address + block * device->block_stride + head * device->head_stride + inside,
        .host_pitch = piece->head_stride,
        .device_pitch = device->head_stride,
        .width = run,
        .height = 1};
    int joined = piece->block_stride == run && device->block_stride == run;
    if (inside || bytes < run) {
        out->width = run - inside < bytes ? run - inside : bytes;
    } else if (head || bytes < whole) {
        uint64_t rows = bytes / run;
        out->height = rows < piece->heads - head ? rows : piece->heads - head;
    } else {
        out->width = joined ? bytes / whole * run : run;
        out->height = piece->heads;
    }
    return out->width * out->height;
}

int copier_copy_range(glue_copier *copier, int direction, cu_stream stream, const glue_piece *piece,
                      const glue_device_piece *device, uint64_t begin, uint64_t bytes)
{
    int error = 0;
    while (bytes && !error) {
        struct rectangle of;
        uint64_t moved = next_rectangle(piece, device, begin, bytes, &of);
        error = copy_rectangle(copier, direction, stream, of);
        begin += moved;
        bytes -= moved;
    }
    return error;
}

int glue_copier_copy(glue_copier *copier, int direction, uint64_t stream, const glue_piece *pieces,
                     const glue_device_piece *device, uint32_t count)
{
    int error = copier_enter(copier);
    if (error)
        return error;
    for (uint32_t i = 0; i < count && !error; i++)
        error = copier_check(copier, &pieces[i]);
    for (uint32_t i = 0; i < count && !error; i++) {
        uint64_t bytes = pieces[i].run_bytes * pieces[i].heads * pieces[i].blocks;
        error = copier_copy_range(copier, direction, stream_of(stream), &pieces[i], &device[i], 0, bytes);
    }
    copier_leave(copier);
    return error;
}
